# make demo and make test each do all their own set-up on a machine that has only Python 3.11, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: setup setup-dev setup-bench demo test test-all check bench format clean

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev
setup-bench: $(VENV)/.installed-bench

$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Shardwise needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/pip pyproject.toml setup.py $(wildcard shardwise/comm/*.[ch]) constraints.txt
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	$(INSTALL) -e '.[bench]'
	@touch $@

demo: setup
	$(BIN)/shardwise train recipes/python_stdlib.py
	$(BIN)/shardwise show latest
	$(BIN)/shardwise sample latest "def "

test: check
	$(BIN)/python -m pytest tests -m 'not slow and not gpu'

test-all: check
	$(BIN)/python -m pytest tests -m 'not gpu'

check: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

bench: setup-bench
	for name in data_parallel startup loader collectives slow_link param_server pipeline tensor memory; do $(BIN)/python -m bench $$name --json bench/results/$$name.json || exit 1; done

format: setup-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
