# make demo   the main job on the repository's own data        make test   all tests
# make check  lint, format, types, import rules, README        make bench  the benchmarks
# make faults the fault suite in ten minutes, and the README's table; make faults-nightly: the whole of it

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check bench faults faults-nightly clean

demo: $(VENV)/.core
	$(BIN)/deft demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

check: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -p no:cacheprovider tests/test_readme.py

bench: $(VENV)/.core
	$(BIN)/python benchmarks/cpu/run.py $(BENCH)
	$(BIN)/python benchmarks/gpu/run.py --dry-run

faults: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m faults --write

faults-nightly: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m faults --scale full --write

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info
