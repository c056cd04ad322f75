# Everything here works in a fresh clone with Python 3.11 or newer, make and git.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo services test soak coverage lint bench compat models faults reference site release clean fetch-services setup-demo setup-dev

help: ## show this list
	@echo "make TARGET [PYTHON=python3.12]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Nothing happens where the environment already has what is asked for, or more.
setup-demo:
	@$(PYTHON) tools/setup.py --venv $(VENV) --extras vllm,demo

setup-dev:
	@$(PYTHON) tools/setup.py --venv $(VENV) --extras dev

# Tests that find no Prometheus are skipped where it cannot be had.
fetch-services:
	-@$(BIN)/python tools/services.py fetch

# Where there is a GPU, vLLM's build for CUDA, in an environment of its own: the two builds are the same package.
demo: ENGINE = $(if $(findstring GPU,$(shell nvidia-smi --list-gpus 2>/dev/null)),cuda,cpu)
demo: DEMO_VENV = $(if $(filter cuda,$(ENGINE)),.venv-cuda,$(VENV))
demo: ## set up, then show time to first token cold, from memory and from LMDB (ARGS="--help", ENGINE=cpu)
	@$(PYTHON) tools/setup.py --venv $(DEMO_VENV) --extras vllm,demo --engine $(ENGINE)
	@$(DEMO_VENV)/bin/kvbm demo $(ARGS)

services: setup-dev ## start etcd and Prometheus on this machine, until Ctrl-C
	@$(BIN)/python tools/services.py run

test: setup-dev fetch-services ## set up, then run all tests (ARGS="-k name")
	@$(BIN)/python tools/run_tests.py $(ARGS)

soak: setup-dev fetch-services ## run the long tests that `make test` leaves out (ARGS="-k name")
	@$(BIN)/python tools/run_tests.py -m soak $(ARGS)

coverage: setup-dev fetch-services ## run all tests and say which lines none has reached (ARGS="-k name")
	@$(BIN)/coverage erase
	@$(BIN)/python tools/run_tests.py --cov --cov-append --cov-report= $(ARGS)
	@$(BIN)/coverage report

lint: setup-dev ## check style, types and who may import whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: setup-dev ## run the benchmarks, one after the other
	@set -e; for file in tests/benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file; done

compat: ## compare names with every version of vLLM that is promised, and run the identity test with some
	@$(PYTHON) tools/compat.py $(ARGS)

models: setup-dev ## prove each family of models, and write the table of docs/reference/models.md (ARGS="--help")
	@$(BIN)/python tools/prove_models.py $(ARGS)

faults: setup-dev ## write the table of planted faults, docs/reference/faults.md
	@$(BIN)/python tests/core/faults_table.py $(ARGS)

reference: setup-dev ## write what pages of the reference have from docstrings and verbs
	@$(BIN)/python tools/make_reference.py
	@$(BIN)/python tools/make_commands.py

site: setup-dev ## build the documentation's site into site/
	@$(BIN)/python tools/make_site.py $(ARGS)

release: setup-dev ## build and check what is uploaded in a release (ARGS=--rehearse for any commit)
	@$(BIN)/python tools/release.py $(ARGS)

clean: ## remove environments and caches
	rm -rf .venv .venv-cuda .venv-compat-* .cache/vllm build dist site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
