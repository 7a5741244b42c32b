# Everything happens in .venv, which is made when it is missing and renewed when what it is made from changed.
# A machine without a GPU saves gigabytes by an index with CPU builds of torch:
#   make quickstart PIP_ARGS="--extra-index-url URL"

PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -c constraints.txt
SOURCES := zconvert tests examples benchmarks docs

# Tests work on tiny tensors: more threads than idle cores make them many times slower.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# One process a core, each with one thread; tests that share trained models stay in one process.
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help test test-slow lint format docs quickstart install clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: .venv/.installed ## the main job end to end on a small model, about 7 minutes on two CPU cores
	$(BIN)/python examples/quickstart.py --out out/quickstart

test: lint ## lint, type checks and tests
	$(PYTEST)

test-slow: .venv/.installed-dev ## the tests that need minutes
	$(PYTEST) -m slow

lint: .venv/.installed-dev ## ruff and mypy
	$(BIN)/python -m ruff check $(SOURCES)
	$(BIN)/python -m ruff format --check $(SOURCES)
	$(BIN)/python -m mypy

format: .venv/.installed-dev ## put the sources into shape
	$(BIN)/python -m ruff check --fix $(SOURCES)
	$(BIN)/python -m ruff format $(SOURCES)

docs: .venv/.installed ## write anew what docs/ has from the code: commands, recipes, families, masks
	$(BIN)/python -m zconvert.cli.reference
	$(BIN)/python docs/generate.py

install: .venv/.installed-dev ## only make .venv

clean: ## remove .venv, caches and out/
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info out

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "zconvert needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing into .venv, which takes a few minutes the first time." >&2
	$(PIP_INSTALL) -e .
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing into .venv, which takes a few minutes the first time." >&2
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ .venv/.installed
