# Each target sets up what it needs: a fresh clone requires only Python 3.11 and make.
#   make serve PORT=8000 ARGS="--dtype bfloat16"       make test       make lint
# PIP_ARGS is passed to every pip install, for example to install PyTorch without CUDA, which is gigabytes smaller:
#   make serve PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PORT ?= 8000
ARGS ?=
PIP_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS)

.PHONY: help setup serve test lint
help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

setup: .venv/runtime.stamp
	@echo "3/3: preparing the default model, unless it is in the cache: two downloads and a conversion"
	@$(BIN)/python -m model.zoo prepare

serve: setup
	$(BIN)/flamboyance serve --port $(PORT) $(ARGS)

# Two processes: Triton binds its kernels at import to either the interpreter or the compiler.
test: setup lint
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/kernels_numeric
	$(BIN)/python -m pytest -q

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .
	$(BIN)/python -m tests.language.check

# Installed again when pyproject.toml changes. The command .venv/bin/flamboyance runs from the source folder.
.venv/runtime.stamp: pyproject.toml | $(BIN)/python
	@echo "2/3: installing the server and its packages into .venv; the largest is PyTorch"
	$(PIP) -e .
	@touch $@

.venv/dev.stamp: .venv/runtime.stamp
	@echo "installing the packages of the tests into .venv"
	$(PIP) -e '.[dev]' -e clients/python
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is required: make PYTHON=...")'
	@echo "1/3: creating the virtual environment .venv"
	$(PYTHON) -m venv .venv

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
	$(BIN)/python -m training.default.ship $(addprefix $(RUNS)/,alignment binding matching)
