# One command each; every target sets up what it needs. `make -C path/to/fedimpr demo` works from any folder.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

export OMP_NUM_THREADS ?= 1
export FLWR_TELEMETRY_ENABLED ?= 0
export FLWR_DISABLE_UPDATE_CHECK ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export HF_HUB_DISABLE_TELEMETRY ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: help setup demo flower test test-all check format bench clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(READY) ## an environment with every pinned version, in .venv

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("fedimpr needs Python 3.11 or later: make setup PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned versions into $(VENV); a minute or two, 2 GB."
	$(BIN)/python -m pip install -qq -r requirements.lock
	$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	touch $@

demo: $(READY) ## one small experiment, from clients to report
	$(BIN)/python -m sim experiment=demo $(ARGS)

flower: $(READY) ## the same through `flwr run`: make flower ARGS='experiment=demo seed=1'
	$(BIN)/python -m sim runtime=flower $(ARGS)

test: $(READY) ## the fast tests, on two cores
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-all: $(READY) ## all tests: slow ones, Ray, and those for an accelerator where there is one
	$(BIN)/python -m pytest -m "" $(ARGS)

check: $(READY) ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) ## the benchmarks; each writes its dated result
	set -e; for work in ensemble.py clients.py start_and_memory.py first_round.py memory.py runners.py cohort_cifar10.py one_shot.py synthesis_speed.py "methods.py mnist" "methods.py cifar10" "target_mismatch.py mnist" transfer_size.py; \
		do $(BIN)/python benchmarks/$$work; done

clean: ## remove the environment and everything generated
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
