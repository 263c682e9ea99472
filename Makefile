# Each target sets up what it needs: a fresh clone requires only Python 3.11 and make.
#   make serve PORT=8000 ARGS="--dtype bfloat16"       make test       make lint
# PIP_ARGS is passed to every pip install, for example to install PyTorch without CUDA, which is gigabytes smaller:
#   make serve PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PORT ?=
ARGS ?=
PIP_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS)
# deploy/locked has all packages but PyTorch by their digests: `make lock` writes it
LOCKED := $(PIP) --require-hashes --no-deps --only-binary :all:
SOURCE := $(PIP) --no-deps --no-build-isolation

.PHONY: help setup serve test lint
help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

setup: .venv/runtime.stamp
	@echo "3/3: preparing the default model, unless it is in the cache: two downloads and a conversion"
	@$(BIN)/python -m model.zoo prepare

serve: setup
	$(BIN)/flamboyance serve $(if $(PORT),--port $(PORT)) $(ARGS)

# Two runs: Triton binds its kernels at import to either the interpreter or the compiler. The tests of a file run in one of
# the processes of a run.
TEST_PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# mypy has one process: it runs beside the tests in the interpreter
test: setup .venv/dev.stamp
	$(MAKE) --no-print-directory -j 2 lint test-interpreter
	$(PYTEST)

.PHONY: test-interpreter
test-interpreter: .venv/dev.stamp
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels_numeric

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .
	$(BIN)/python -m tests.language.check

# Installed again when pyproject.toml or the lock changes. The command .venv/bin/flamboyance runs from the source folder.
.venv/runtime.stamp: pyproject.toml deploy/locked/server.txt deploy/locked/torch.txt | $(BIN)/python
	@echo "2/3: installing the server and its packages into .venv; the largest is PyTorch"
	$(LOCKED) -r deploy/locked/server.txt
	$(PIP) -r deploy/locked/torch.txt
	$(SOURCE) -e .
	@touch $@

.venv/dev.stamp: .venv/runtime.stamp deploy/locked/tests.txt
	@echo "installing the packages of the tests into .venv"
	$(LOCKED) -r deploy/locked/tests.txt
	$(SOURCE) -e clients/python
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15) and "Python 3.11 to 3.14 is required: make PYTHON=...")'
	@echo "1/3: creating the virtual environment .venv"
	$(PYTHON) -m venv .venv

# The playground: `make playground` builds the page that the server serves and that is committed; `make test-web` compares
# that page with a new build, and tests it in Chromium against a server with the default model. Both need node and npm.
.PHONY: playground test-web web-packages
WEB := clients/playground
NPM := npm --prefix $(WEB)
REBUILT := $(WEB)/test-results/rebuilt

web-packages: $(WEB)/node_modules/installed.stamp | chromium

playground: $(WEB)/node_modules/installed.stamp openapi-types
	$(NPM) run build

test-web: setup .venv/dev.stamp $(WEB)/node_modules/installed.stamp openapi-types | chromium
	git diff --exit-code --stat $(WEB)/src/api/schema.d.ts
	$(NPM) run check
	OUT_DIR=$(CURDIR)/$(REBUILT) $(NPM) run build
	diff -r $(REBUILT) server/api/static/playground
	$(NPM) test

# writes the pictures of the documentation to docs/images, best on a quiet machine: they show times
.PHONY: pictures openapi-types chromium
pictures: setup .venv/dev.stamp $(WEB)/node_modules/installed.stamp | chromium
	$(NPM) run pictures

openapi-types: .venv/runtime.stamp $(WEB)/node_modules/installed.stamp
	$(BIN)/flamboyance openapi >$(WEB)/openapi.json
	$(NPM) run types

chromium:
	@command -v chromium >/dev/null || { apt-get update && apt-get install -y --no-install-recommends chromium fonts-dejavu-core; }

$(WEB)/node_modules/installed.stamp: $(WEB)/package-lock.json
	npm ci --prefix $(WEB) --no-audit --no-fund
	@touch $@

# A real Prometheus scrapes a real server: the dashboard and the alerts of deploy/. The manifests of Kubernetes are rendered,
# and the Dockerfile is linted. A fleet on a real Ray loses no request, whatever happens to its replicas. `make panels` draws
# the pictures of the dashboard in the documentation, in five minutes. `make rehearse-image` runs the steps of the Dockerfile
# and then its server in a chroot, as root, in about ten minutes:
#   make rehearse-image ARGS="--build-arg TORCH_INDEX=https://..."
.PHONY: test-deploy deploy-packages panels rehearse-image
deploy-packages: .venv/deploy.stamp

test-deploy: deploy-packages
	$(BIN)/python -m pytest -q deploy/tests

panels: setup .venv/deploy.stamp
	$(BIN)/python -m deploy.pictures $(ARGS)

rehearse-image: .venv/deploy.stamp
	@command -v debootstrap >/dev/null || { apt-get update && apt-get install -y --no-install-recommends debootstrap; }
	$(BIN)/python -m deploy.rehearsal $(ARGS)

.venv/deploy.stamp: .venv/dev.stamp deploy/locked/all.txt
	@command -v promtool >/dev/null && command -v kustomize >/dev/null || \
		{ apt-get update && apt-get install -y --no-install-recommends prometheus kustomize; }
	$(LOCKED) -r deploy/locked/all.txt
	@touch $@

# The supply chain. `make lock` writes deploy/locked from the bounds in pyproject.toml: ARGS="--upgrade" for newer versions.
# `make wheels` checks that all of it can be installed, `make audit` looks for advisories about it, `make ages` for packages
# without a recent release, and `make sbom` writes the bill of materials, sbom.json.
.PHONY: lock wheels audit ages sbom
lock wheels audit ages sbom: .venv/dev.stamp
	$(BIN)/python -m deploy.supply.$@ $(ARGS)

# Trains the bridge of the default model, from packages of the registries to model/zoo/bridge.safetensors. Each stage
# continues from its latest checkpoint, and pauses between steps while the file named by PAUSE exists.
PAUSE ?= .pause-training
RUNS := $(HOME)/.cache/flamboyance/default-run

.PHONY: train-default
train-default: setup .venv/dev.stamp
	$(BIN)/python -m training.default_data
	$(BIN)/python -m training training/default/alignment.yaml --pause-file $(PAUSE)
	$(BIN)/python -m training training/default/binding.yaml --pause-file $(PAUSE)
	$(BIN)/python -m training training/default/matching.yaml --pause-file $(PAUSE)
	$(BIN)/python -m training training/default/settling.yaml --pause-file $(PAUSE)
	$(BIN)/python -m training.default.ship $(addprefix $(RUNS)/,alignment binding matching settling)
