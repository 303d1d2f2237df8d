# The verbs of nano-vllm-hust; `make help` lists them. All of them work in .venv and make it where it is missing.
#
# Settable, as in `make demo PYTHON=python3.12`:
#   PYTHON          the interpreter that makes .venv, 3.11 or newer
#   TORCH_INDEX     the index that torch comes from; unset: a CPU build, see scripts/install_torch.sh
#   TORCH_VERSION   the torch to install where .venv has none
#   PIP_INDEX_URL   a mirror of the package index; pip reads it (and its other PIP_* variables) itself
#   PYTEST_FLAGS    more flags for pytest
#   PYTEST_WORKERS  test processes, one torch thread each

PYTHON ?= python3
PYTEST_WORKERS ?= 2
QUESTION ?= Why is the sky blue? Answer in two sentences.

export TORCH_INDEX TORCH_VERSION
export PATH := $(CURDIR)/.venv/bin:$(PATH)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install demo test test-long bars lint fix bench clean model

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.installed ## make .venv and install the package with a CPU build of torch

demo: install model ## ask the default model a question; stream the answer, then its timeline
	$(BIN)/nanovllm run smollm2 "$(QUESTION)" --max-tokens 120 --timeline

test: .venv/.test-installed model lint ## linter, formatter, types, and every test but the long ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not long" -n $(PYTEST_WORKERS) --dist worksteal $(PYTEST_FLAGS)

test-long: .venv/.test-installed model ## the long proofs, and the server's tests with the engine in a child process
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long -n $(PYTEST_WORKERS) --dist worksteal $(PYTEST_FLAGS)
	NANOVLLM_TEST_ENGINE=process OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/serve -m "not long" \
	    -n $(PYTEST_WORKERS) --dist worksteal $(PYTEST_FLAGS)

bars: .venv/.bench-installed model ## each promised figure beside its bar
	$(BIN)/python benchmarks/bars.py

bench: .venv/.bench-installed model ## the engine's speed on this machine, one JSON line
	$(BIN)/python benchmarks/engine.py

lint: .venv/.test-installed ## linter, formatter, types, import order and sizes, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(BIN)/python -m pytest -p no:xdist tests/test_house.py -k test_sizes  # prints its table

fix: .venv/.test-installed ## mend what linter and formatter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and every cache of the tools
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find nanovllm tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

model: install
	@$(BIN)/nanovllm pull smollm2 > /dev/null

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name one: make PYTHON=python3.12" >&2; \
	    exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml scripts/install_torch.sh | .venv/bin/python
	scripts/install_torch.sh .venv/bin/python
	$(PIP) --quiet -e ".[grammar]"
	@touch $@

.venv/.test-installed: .venv/.installed
	$(PIP) --quiet -e ".[test]"
	@touch $@

.venv/.bench-installed: .venv/.installed
	$(PIP) --quiet -e ".[bench]"
	@touch $@
