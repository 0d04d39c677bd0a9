# Two commands for a newcomer: `make demo` and `make test`. Python >= 3.10, nothing else prepared.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO_OUTPUT ?= demo-output
PYTEST_WORKERS ?= 2
# Threads of each worker: more of them than cores wait for each other.
TEST_THREADS ?= 1

.PHONY: demo test attack bench lint types docs check-site benchmarks figures format clean

demo: $(VENV)/.installed-demo
	$(BIN)/captum-classfilters demo --output $(DEMO_OUTPUT)

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal

# Damaged files, killed runs, threads and failing processes; within 20 minutes on two cores.
attack: $(VENV)/.installed-test
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m benchmarks.attack

# The slow computations against the straightforward way: one table of ratios.
BENCH_OPTIONS ?=
bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.speed_table $(BENCH_OPTIONS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed-lint $(VENV)/.installed-test
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html
	$(BIN)/python docs/make_atlases.py docs/_build/html/_static/atlas

# The built pages in a browser: dead links and anchors, pictures, widths, accessibility.
check-site: docs $(VENV)/.installed-test
	CLASSFILTERS_SITE=docs/_build/html $(BIN)/python -m pytest -q tests/browser/test_browse_site.py

format: $(VENV)/.installed-lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per extra: installing again happens only when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info docs/_build $(DEMO_OUTPUT)
