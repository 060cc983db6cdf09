# Two commands set everything up: `make demo` and `make test`. Each makes .venv first where it is missing.
PYTHON ?= python3
DEVICE ?= $(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu)
BIN := .venv/bin

.PHONY: setup demo test test-slow lint samples
setup: .venv/.ready

.venv/.ready: pyproject.toml setup.cfg constraints/$(DEVICE).txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python %d.%d found; 3.11 or 3.12 needed: make PYTHON=python3.11 ..." % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints/$(DEVICE).txt -e '.[dev]'
	@touch $@

demo: setup ## the main job on bundled images, minutes on two CPU cores
	$(BIN)/python -m infimed.train experiment=quickstart

test: setup ## everything fast, no network
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports
	$(BIN)/python -m pytest -m 'not slow and not gpu'

test-slow: setup ## the quickstart's promises
	$(BIN)/python -m pytest -m slow --timeout=1500

samples: setup ## build samples/ again from the packages that the pictures come from; needs the network
	$(BIN)/python -m tools.build_samples

lint: setup
	$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/lint-imports
