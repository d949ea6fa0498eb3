# Two commands: `make demo` runs the main job on real data; `make test` runs every check.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TORCH  := $(shell sed -n 's/^torch==//p' constraints.txt)
KEY    := $(shell cat constraints.txt pyproject.toml | cksum | cut -d' ' -f1)
BASE   := $(VENV)/.base-$(KEY)
DEV    := $(VENV)/.dev-$(KEY)

# A machine with an NVIDIA GPU gets what the GPU engine needs; where torch sees the GPU, the demo then trains and runs on it.
EXTRAS := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo '[cuda,cudnn,peers]')

.PHONY: demo test lint types unit install clean

demo: $(BASE)
	$(BIN)/twofour compress demo --data digits --seeds 3 --device auto --out runs/demo --overwrite

test: lint types unit

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)
	$(BIN)/mypy

# Two workers fill two cores: what a test starts computes on one thread.
unit: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 25

install: $(BASE)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# A machine without an NVIDIA GPU takes the CPU build of torch: a local wheel where pip is configured with one, else PyTorch's CPU index.
$(BASE): $(VENV)/bin/python
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then \
	  $(PIP) --no-index --no-deps "torch==$(TORCH)+cpu" 2>/dev/null \
	  || $(PIP) --extra-index-url https://download.pytorch.org/whl/cpu "torch==$(TORCH)+cpu"; \
	fi
	$(PIP) -e .
	@if [ -n "$(EXTRAS)" ]; then \
	  $(PIP) -e '.$(EXTRAS)' || echo "what the GPU engine needs cannot be installed beside this torch: engines will be built for the CPU"; \
	fi
	@touch $@

$(DEV): $(BASE)
	$(PIP) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
