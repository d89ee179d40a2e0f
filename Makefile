# Everything runs in .venv. `make help` lists the targets.
SHELL := bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
# More arguments for `serve`, `test` (pytest) and `bench`: make test ARGS="-k pool -x"
ARGS ?=
# Hostile adapters that `make fuzz` tries.
CASES ?= 20000
# Where torch comes from, if not from pip's usual index. On Linux without a GPU this saves
# gigabytes: make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
ADAPTERS := $(patsubst %/adapter_config.json,%,$(sort $(wildcard examples/adapters/*/adapter_config.json)))
LORA_MODULES := $(foreach path,$(ADAPTERS),$(notdir $(path))=$(path))
CODE := src tests bench docs examples

.PHONY: help install serve test fuzz fmt check bench sanitize docs clean

help: ## Show this list
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

install: .venv/.installed ## Prepare .venv with all that tests and development need

serve: .venv/.runtime ## Serve the demo model with the demo adapters (HOST, PORT, ARGS)
	@set -o pipefail; model="$$($(BIN)/python examples/demo_model.py | tail -n 1)" && \
	exec $(BIN)/loramux serve "$$model" --served-model-name smollm2-135m-instruct \
	  --enable-lora --max-loras 8 --max-lora-rank 16 --max-cpu-loras 32 \
	  $(if $(LORA_MODULES),--lora-modules $(LORA_MODULES)) --host $(HOST) --port $(PORT) $(ARGS)

test: .venv/.installed ## Run all tests, lint and types included, on all cores
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

fuzz: .venv/.installed ## Try 20,000 hostile adapters on the reader (CASES, ARGS); minutes, for every night
	LORAMUX_FUZZ_CASES=$(CASES) $(BIN)/python -m pytest -q tests/unit/test_adapter_fuzz.py $(ARGS)

fmt: .venv/.installed ## Format the code and repair what lint can repair
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

check: .venv/.installed ## Format, lint, types and import contracts, without the other tests
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: .venv/.installed ## Measure loramux beside transformers and PEFT (ARGS=--quick for a look)
	@set -o pipefail; model="$$($(BIN)/python examples/demo_model.py | tail -n 1)" && \
	$(BIN)/loramux bench throughput --model "$$model" --peers bench/peers --output bench/results $(ARGS)

# Each allocation on its own: a write past a tensor then leaves the memory, and is seen.
sanitize: .venv/.installed ## Look for invalid accesses and races in the Triton kernels (needs a GPU)
	@for tool in memcheck racecheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --target-processes all \
	    --error-exitcode 86 $(BIN)/python -m pytest -q tests/kernels -k triton $(ARGS) || exit; \
	done

docs: .venv/.installed ## Write docs/configuration.md anew and run the documentation's tests
	$(BIN)/python docs/generate.py
	$(BIN)/python -m pytest -q tests/architecture/test_docs.py

clean: ## Remove .venv, caches and build products (the demo model stays in its cache)
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are newer than what they were made from, so a second run installs nothing.
# torch goes first and alone: pip then keeps the build it finds here, whatever else is wanted.
.venv/.runtime: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) -e '.[demo]'
	@touch $@

.venv/.installed: .venv/.runtime
	$(PIP) -e '.[demo,test,dev]'
	@touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "loramux needs Python >= 3.11, and '$(PYTHON)' is" \
	    "$$($(PYTHON) -V 2>&1 || true). Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
