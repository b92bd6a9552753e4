# The commands of a fresh machine:  make demo  and  make test;  while you work,  make check.
# COMFYUI_PATH=/path/to/ComfyUI uses a ComfyUI of your own instead of the pinned one.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# Torch's threads wait spinning otherwise, and beside other programs run several times slower.
export OMP_WAIT_POLICY ?= passive
# Two workers, and torch's threads one in each; tests/conftest.py says who gets which tests.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS)
check test test-long: export OMP_NUM_THREADS ?= 1

.PHONY: setup demo check test test-long lint format bench gallery locales clean

setup: $(STAMP)

$(STAMP): tests/requirements.txt tests/constraints.txt tests/comfyui.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python tests/support/comfyui.py setup
	$(BIN)/python bench/versions.py --fetch
	@touch $@

demo: setup
	$(BIN)/python tests/support/demo.py

# Without ComfyUI and without what is slow: kernels, files, reports, the rules of the repository.
check: setup
	$(PYTEST) -m "not comfy and not slow and not long" --durations=10

test: setup
	$(PYTEST) -m "not long" --durations=15

test-long: setup
	$(PYTEST) --durations=30

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python bench/cpu.py
	$(BIN)/python bench/host.py
	$(BIN)/python bench/convert.py
	$(BIN)/python bench/quality.py --layer
	$(BIN)/python bench/images.py
	$(BIN)/python bench/budget.py
	$(BIN)/python bench/lora.py
	$(BIN)/python bench/lora.py --image

gallery: setup
	MXFP8_KEEP_PICTURES=1 $(BIN)/python -m pytest -q tests/web/test_gallery.py tests/in_comfyui/test_emoji.py

# UNCHANGED="key ..." names texts whose translation still fits the new English.
locales: setup
	$(BIN)/python tests/support/translations.py $(UNCHANGED)

clean:
	rm -rf $(VENV) demo-output build dist *.egg-info
