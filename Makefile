# Every step of a developer and of .ci/run; `make` lists them.
SHELL := bash
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --constraint constraints.txt
# What importing FlashInfer needs on a machine without CUDA; its other needs are gigabytes.
FLASHINFER_NEEDS := apache-tvm-ffi filelock numpy nvidia-ml-py packaging requests tqdm

# ARGS says what to serve, or it is the demo. With `--device cuda…` the kernels are installed too.
WORDS := $(strip $(subst =, ,$(ARGS)))
NAMED := $(filter --model --identity --config --demo,$(WORDS))
WANTED := $(if $(NAMED),,--demo) $(ARGS)
INSTALLED := $(if $(findstring --device cuda,$(WORDS)),.venv/.gpu-installed,.venv/.installed)

# On a terminal it is a job of its own: Ctrl-C then ends the server, which exits 0, and not make.
SERVE := $(BIN)/expertd serve $(WANTED)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install serve test test-all lint format proto bench bench-cpu clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 10

install: $(INSTALLED) ## make .venv and install into it (serve and test do so when needed)

serve: $(INSTALLED) ## serve the demo on CPU, or what ARGS="--model NAME=PATH --device cuda:0" says
	@if [ -t 0 ]; then set -m; $(SERVE); else exec $(SERVE); fi

test: .venv/.installed ## the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

test-all: test ## the fast tests, then the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

lint: .venv/.installed ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: ## regenerate the protobuf code (own .venv-proto)
	PYTHON=$(PYTHON) tools/proto

bench: .venv/.installed ## benchmarks of the way there and back, on CPU
	$(BIN)/python -m tests.bench.admission
	$(BIN)/python -m tests.bench.grpc_servers
	$(BIN)/python -m tests.bench.rpc_cpu

bench-cpu: .venv/.installed ## the CPU's experts beside transformers', and what merging gains
	$(BIN)/python -m tests.bench.cpu

clean: ## delete caches and build outputs; the environments stay
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
	  f"expertd needs Python 3.11 or newer, this is {sys.version}; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt Makefile | .venv/bin/pip
	$(INSTALL) --editable '.[dev]' $(FLASHINFER_NEEDS)
	$(INSTALL) --no-deps flashinfer-python
	@touch $@

.venv/.gpu-installed: .venv/.installed
	$(INSTALL) --editable '.[dev,gpu]'
	@touch $@
