# make demo   the main job on the repository's own data        make test   all tests
# make check  lint, format, types, import rules, README        make bench  the benchmarks
# make faults the fault suite in ten minutes, and the README's table; make faults-nightly: the whole of it
# make lock   constraints.txt with the newest versions      make test-newest  what depends on them, with the newest

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NEWEST := .venv-newest/bin
# Held where everything else is the newest: each torch is gigabytes, and changes in torch are taken one by one.
TORCH := torch==2.13.0
# Beside the other, for the test that servers which run it read the same model from final/.
TRANSFORMERS_4 := transformers==4.57.6 huggingface_hub==0.36.0 tokenizers==0.22.1 requests urllib3 idna certifi \
	charset-normalizer
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-newest check bench faults faults-nightly newest lock clean

demo: $(VENV)/.core
	$(BIN)/deft demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# Laws 6, 7, 8 and 11, the hand-off, the optimizers and the demo, in an environment of its own, which alone has torchao:
# where that is installed, every import of transformers imports it too.
test-newest: newest
	OMP_NUM_THREADS=1 $(NEWEST)/python -m pytest -n auto tests/laws/test_law_06_packing.py tests/laws/test_law_07_loss.py \
		tests/laws/test_law_08_accumulation.py tests/laws/test_law_11_parity.py tests/export/test_export.py \
		tests/training/test_optimizers.py
	folder=$$(mktemp -d) && $(NEWEST)/deft demo --output $$folder/demo && rm -r $$folder

newest:
	$(PYTHON) -m venv $(dir $(NEWEST))
	$(NEWEST)/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[dev]" $(TORCH) \
		torchao

lock: newest
	sed -n '/^#/p' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/python -m pip freeze --exclude-editable | sed 's/+.*//' >> $(NEWEST)/constraints.txt
	mv $(NEWEST)/constraints.txt constraints.txt

check: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -p no:cacheprovider tests/test_readme.py tests/test_house.py

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
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/transformers-4 $(TRANSFORMERS_4)
	@touch $@

clean:
	rm -rf $(VENV) $(dir $(NEWEST)) build dist src/*.egg-info
