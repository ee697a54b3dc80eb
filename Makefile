# `make demo` and `make test` set everything up on a machine with Python >= 3.10 and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CUDA part takes minutes to compile, and nothing runs it without a GPU.
SORA_BUILD ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo auto || echo cpu)
NATIVE := pyproject.toml setup.py sora_kernels/_version.py sora_kernels/_native.py \
	$(shell find csrc \( -name emu -o -name __pycache__ \) -prune -o -type f -print)

.PHONY: demo test bench audit fuzz sanitize lint install clean

demo: install
	$(BIN)/sora demo

test: lint
	$(BIN)/pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/pytest benchmarks

audit: install
	$(BIN)/python -m sora_kernels.audit

fuzz: install
	SORA_FUZZ=0:1999 $(BIN)/pytest -q tests/fuzz

sanitize: install
	$(BIN)/python tests/native/sanitize/run.py --last 999
	$(BIN)/python tests/native/sanitize/run.py --last 999 --kind thread

install: $(VENV)/.installed

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, this is " + sys.version + "; name one: make PYTHON=python3.x" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and from its own line: nothing that comes later may pull in another build of it.
$(VENV)/.requirements: requirements-dev.txt $(VENV)/.python
	$(BIN)/pip install -q "$$(grep '^torch==' requirements-dev.txt)"
	$(BIN)/pip install -q -r requirements-dev.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.requirements $(NATIVE)
	SORA_BUILD=$(SORA_BUILD) $(BIN)/pip install -q --no-build-isolation --no-deps -e .
	@touch $@

clean:
	rm -rf build dist *.egg-info sora_kernels/_C*.so $(VENV)/.installed
