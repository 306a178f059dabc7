# `make demo` and `make test` are all that a newcomer needs; both create the environment first if it is missing.
PYTHON ?= python3
VENV ?= .venv
PYTEST_FLAGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help env demo test lint types wheel-test docs clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(READY) ## create or update the virtual environment (a torch in range that is already there is kept)

$(READY): pyproject.toml constraints.txt scripts/environment.py
	$(PYTHON) scripts/environment.py $(VENV)
	@touch $@

demo: env ## run the quickstart recipe: baseline and patched variants on the bundled model
	$(BIN)/lmmhooks run quickstart

test: env ## the whole test suite, offline
	$(BIN)/python -m pytest -n auto $(PYTEST_FLAGS)

lint: env ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env ## mypy over both packages
	$(BIN)/mypy

wheel-test: env ## build the wheel, install it elsewhere and use it from another folder
	$(BIN)/python -m pytest -m packaging

docs: env ## regenerate the tables of README.md and docs/ from their result files
	$(BIN)/python docs/build.py

clean: ## remove caches and build products, keep the environments
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lmmhooks eval tests -name __pycache__ -type d -prune -exec rm -rf {} +
