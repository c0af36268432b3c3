# Each target sets up .venv from nothing where needed; a second call finds it ready.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One exact version, so that pip takes a CPU build where one is offered (PIP_EXTRA_INDEX_URL=
# https://download.pytorch.org/whl/cpu offers it on Linux) and every machine tests the same one.
TORCH := torch==2.13.0
READY := $(VENV)/ready
WEB_READY := decoder/web/node_modules/ready
# Each worker computes on one thread: more would wait for each other
WORKERS ?= 2

.PHONY: demo test test-slow bench web format clean

demo: $(READY)
	$(BIN)/python examples/demo.py

# The tests of decoder/web run where Node and Chromium are; elsewhere pytest names what is missing.
test: $(READY) $(if $(shell command -v npm 2>/dev/null),$(WEB_READY))
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS)

test-slow: $(READY)
	$(BIN)/pytest -q -m slow

# Six Kodak images where ../shared is, matplotlib's sample photo elsewhere. What results/ holds already is not measured
# again.
BENCH_IMAGES ?= $(or $(wildcard $(foreach n,01 05 08 15 20 23,../shared/data/kodak/kodim$(n).png)),$(SAMPLE))
SAMPLE = $(shell $(BIN)/python -c 'import matplotlib; print(matplotlib.get_data_path())')/sample_data/grace_hopper.jpg

bench: $(READY)
	$(BIN)/clric-bench run $(BENCH_IMAGES) -o results --jobs 2 $(addprefix --metrics ,$(wildcard ../shared/metrics))

# A page of clric images beside AVIF and ThumbHash: http://localhost:8080
WEB_IMAGES ?= $(or $(wildcard $(foreach n,04 07 15 19 20 23,../shared/data/kodak/kodim$(n).png)),$(SAMPLE))
PORT ?= 8080

web: $(READY) $(WEB_READY)
	$(BIN)/python examples/web.py $(WEB_IMAGES) --port $(PORT)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]' '$(TORCH)'
	touch $@

$(WEB_READY): decoder/web/package-lock.json
	cd decoder/web && npm ci --no-audit --no-fund --ignore-scripts
	touch $@

clean:
	rm -rf $(VENV) demo-out web-out decoder/web/node_modules dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
