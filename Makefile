# make demo    from nothing to a policy that has learned
# make test    everything that CI runs
# Both make .venv first if need be. A GPU machine: see "Installation" in README.md.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
RECIPE ?= grpo_arithmetic
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-warn-script-location

BENCHMARKS := startup vocabulary publish against_trl# of tests/benchmarks, the longest last
PYTEST := $(BIN)/pytest -q
PYTEST_PER_CORE := OMP_NUM_THREADS=1 $(PYTEST) --numprocesses logical --maxprocesses 4 --dist worksteal

.PHONY: demo test lint format types unit bench curves venv clean

demo: venv
	$(BIN)/troupe run $(RECIPE)

# Each suite in processes of its own: what one leaves behind (threads, Ray, an engine) cannot affect the next. The tests of
# tests/ray and tests/chaos run one by one, because each starts processes for all cores.
test: lint types unit
	$(PYTEST_PER_CORE) tests/contract
	$(PYTEST) tests/ray
	$(PYTEST) tests/chaos
	$(PYTEST) tests/gpu

unit: venv
	$(PYTEST_PER_CORE) tests/test_house.py tests/unit tests/golden

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: venv
	$(BIN)/pyright

bench: venv
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python tests/benchmarks/$$name.py || exit 1; done

curves: venv
	$(BIN)/python tests/benchmarks/learning_curves.py

venv: $(STAMP)

# torch first and by itself, so that its CPU build is taken where there is one; then the pinned list as it stands
# (why without dependencies: requirements/cpu.lock).
$(STAMP): pyproject.toml requirements/cpu.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==$(shell sed -n 's/^torch==//p' requirements/cpu.lock)
	$(PIP) --no-deps -r requirements/cpu.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $(STAMP)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
