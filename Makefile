# `make serve` and `make test` set up what they need; everything lives in .venv. How it is installed: deploy/install.sh.
# PYTHON, TORCH=cpu|cuda and FAISS=cpu|gpu choose otherwise than by themselves; export them to keep them. ARGS go to the command.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
export PYTHON TORCH FAISS

BIN := .venv/bin
# A stamp per state of the pins: a second `make serve` starts at once, a changed pin reinstalls.
PINS := $(shell { cat pyproject.toml constraints.txt deploy/install.sh; echo "$(TORCH) $(FAISS)"; } | cksum | cut -d' ' -f1)
RUNTIME := .venv/.stamp-runtime-$(PINS)
DEV := .venv/.stamp-dev-$(PINS)
TYPED := adapters service $(if $(wildcard loadtest/*.py),loadtest)

PEERS := peft adapterhub

DEVICE ?= cpu
DTYPE ?= bfloat16
SIZE ?= base
ON_DEVICE := tests/parity tests/service/test_batch_independence.py tests/service/test_transfers.py --ignore-glob='*mutations.py'

.PHONY: help setup setup-dev serve demo bench peers test check-device bench-device format lint types imports files check

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

$(RUNTIME):
	@bash deploy/install.sh runtime
	@rm -f .venv/.stamp-* && touch $@

$(DEV):
	@bash deploy/install.sh dev
	@rm -f .venv/.stamp-* && touch $(RUNTIME) $@

setup: $(RUNTIME) ## make .venv with what serving needs

setup-dev: $(DEV) ## make .venv with the tools for tests and checks too

serve: $(RUNTIME) ## run the server with the demo backbone and adapters (ARGS="--port 9000")
	$(BIN)/adapter-bank serve --demo $(ARGS)

demo: $(RUNTIME) ## train the demo backbone and adapters anew
	$(BIN)/python -m service.demo.build $(ARGS)

bench: $(RUNTIME) ## run the benchmark ladder
	$(BIN)/python -m loadtest.bench $(ARGS)

peers: $(PEERS:%=.peers/%/.stamp) ## make the environments of libraries that `make bench ARGS=peers` compares with

.peers/%/.stamp: loadtest/peers/%-requirements.txt constraints.txt
	@VENV=.peers/$* bash deploy/install.sh $<
	@touch $@

test: $(DEV) ## run the tests in two processes (ARGS="-n 0 -k scheduler": in one, and some of them)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

check-device: $(DEV) ## run parity and batch independence on a device (DEVICE=cuda), then bench-device
	TEST_DEVICE=$(DEVICE) $(BIN)/python -m pytest -n 0 $(ON_DEVICE) $(ARGS)
	$(MAKE) --no-print-directory bench-device

bench-device: $(RUNTIME) ## run the ladder on a device (DEVICE=cuda DTYPE=bfloat16 SIZE=base) and keep it in loadtest/RESULTS.md
	RECORD=1 $(BIN)/python -m loadtest.bench all --device $(DEVICE) --dtype $(DTYPE) --size $(SIZE) $(BENCH_ARGS)

format: $(DEV) ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

lint: $(DEV) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV) ## mypy --strict
	$(BIN)/mypy $(TYPED)

imports: $(DEV) ## who may import whom
	$(BIN)/lint-imports --no-logo

files: $(DEV) ## Dockerfile and compose file
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml

check: lint types imports files ## everything that needs no test run
