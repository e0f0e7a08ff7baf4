# Needs Python 3.11+ and make; everything else is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo demo-train demo-diffusion test check tests install-light install-all benchmarks clean

demo: install-light  ## ingest, distil and recall on the shipped sample logs
	$(BIN)/workbench demo

demo-train: install-all  ## train a teacher and, by three methods, students; which won? (CPU, minutes)
	$(BIN)/workbench demo-train

demo-diffusion: install-all  ## train a generator of digits, distil it to one step, draw both (CPU, minutes)
	$(BIN)/workbench demo-diffusion

test: install-all check tests  ## lint, types, import contract, tests

check:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python tests/size_gate.py

tests:
	$(BIN)/python -m pytest -n 2

install-light: $(VENV)/.light

install-all: $(VENV)/.all

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.light: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# torch first: with 2.13.0 there, nothing that follows pulls another build.
$(VENV)/.all: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[test,train]'
	touch $@ $(VENV)/.light

clean:
	rm -rf $(VENV) build *.egg-info
