# make quickstart: train, sample and decode on real data, write a report
# make test:       run the tests (SLOW=1: the long ones, too)
# make lint:       ruff and pyright
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ifdef SLOW
MARK :=
else
MARK := -m "not slow"
endif

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.demo
	$(BIN)/python -m giantsteps.experiments.quickstart

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 $(MARK) --durations=25

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p .cache/lint && ln -sfn ../.. .cache/lint/giantsteps
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "giantsteps needs Python >= 3.11, but $(PYTHON) is %s; try make PYTHON=python3.11" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: setup.py pyproject.toml $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) .cache build *.egg-info
