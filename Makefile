# Each target sets up .venv from nothing where needed; a second call finds it ready.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One exact version, so that pip takes a CPU build where one is offered (PIP_EXTRA_INDEX_URL=
# https://download.pytorch.org/whl/cpu offers it on Linux) and every machine tests the same one.
TORCH := torch==2.13.0
READY := $(VENV)/ready
# Each worker computes on one thread: more would wait for each other
WORKERS ?= 2

.PHONY: demo test test-slow format clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS)

test-slow: $(READY)
	$(BIN)/pytest -q -m slow

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]' '$(TORCH)'
	touch $@

clean:
	rm -rf $(VENV) demo-out dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
