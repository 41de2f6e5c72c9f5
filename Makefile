# `make demo` then `make test` are all the set-up there is.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Without a GPU, pin the CPU build of PyTorch.
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo --constraint constraints-cpu.txt)
# Tests run in so many processes, each with a thread of its own.
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)
NATIVE := $(wildcard src/skimp/kernels/native/src/*) setup.py

.PHONY: demo test test-all lint format clean

$(VENV)/.installed: pyproject.toml constraints-cpu.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/skimp info tales
	$(BIN)/skimp generate tales "Once upon a time there was a little fox who" --max-tokens 160 --temperature 0.7 --seed 42
	rm -rf build/tales-int4
	$(BIN)/skimp shrink tales recipes/int4-hqq.yaml -o build/tales-int4
	$(BIN)/skimp price tales build/tales-int4 --batch 1,8 --context 128 --rounds 2 --max-bytes 40k

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.installed-dev
	$(PYTEST)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist src/*.egg-info src/skimp/kernels/native/*.so
