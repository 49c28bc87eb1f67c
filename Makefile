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
PYTEST_PER_CORE := OMP_NUM_THREADS=1 $(PYTEST) --numprocesses logical --maxprocesses 4
# One process more than there are cores: a third of the time, a unit test waits (for a deadline, or for a process).
PYTEST_OF_UNITS := OMP_NUM_THREADS=1 $(PYTEST) --numprocesses $$(($$(nproc) + 1)) --maxprocesses 4 --dist worksteal
PYTEST_THREE_FILES := $(PYTEST) --numprocesses 3 --dist loadfile --no-loadscope-reorder
SLOWEST := --durations 20 --durations-min 15# so that what became slow is seen where it happens

# Some containers set it. Without files of bytecode each process of the tests would compile all that it imports of ours.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test trackers browser lint format types unit bench curves venv clean

demo: venv
	$(BIN)/troupe run $(RECIPE)

# Each suite in processes of its own: what one leaves behind (threads, Ray, an engine) cannot affect the next. Of tests/ray
# and tests/chaos three files run at a time, however many cores there are: each has a Ray or a run of its own, whose
# processes wait for one another half of the time.
test: lint types unit trackers browser
	$(PYTEST_PER_CORE) --dist loadgroup $(SLOWEST) tests/contract
	$(PYTEST_THREE_FILES) $(SLOWEST) tests/ray tests/chaos
	$(PYTEST) tests/browser
	$(PYTEST) tests/gpu

# The libraries of the trackers, where they can be installed; their tests are skipped where not, and say so.
trackers: venv
	@$(PIP) --no-deps -r requirements/trackers.txt || echo "no libraries of trackers: their tests will be skipped"

# Chromium and what drives it, where they can be installed; the tests of the page are skipped where not, and say so.
browser: venv
	@$(PIP) --no-deps -r requirements/browser.txt || echo "playwright cannot be installed: tests/browser will be skipped"
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	    timeout 180 apt-get install -y -qq chromium >/dev/null 2>&1; } || echo "no Chromium: tests/browser will be skipped"

unit: venv
	$(PYTEST_OF_UNITS) tests/test_house.py tests/unit tests/golden

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
