# Every target sets up what it needs in .venv, from nothing but Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help demo test check lint format bench docs clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 14

demo: .venv/.plots  ## train a dense and a low-rank model on real text and compare them (5 minutes)
	$(BIN)/python examples/demo.py

test: .venv/.dev  ## all tests
	$(TEST_ENV) $(BIN)/python -m pytest -n 2

check: lint  ## format, lint, types, import contract, then the fast tests (3 minutes)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m 'not slow'

lint: .venv/.dev  ## format, lint, types and import contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.dev  ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.plots  ## linears and FFNs on this machine, each beside its bar (20 minutes)
	$(BIN)/factorlm bench kernel
	$(BIN)/factorlm bench kernel --shapes 768x3072 --tokens 16384 --structures low_rank \
	  --passes forward+backward --rounds 5
	$(BIN)/factorlm bench ffn --passes forward+backward

docs: .venv/.docs  ## the documentation site, in build/docs; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean
	@echo 'open build/docs/index.html; to search too: $(BIN)/python -m http.server -d build/docs'

clean:  ## remove the environment and caches, not runs or data
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'factorlm needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...'; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.plots: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --progress-bar off -q -c constraints.txt -e '.[plots]'
	@touch $@

.venv/.docs: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --progress-bar off -q -c constraints.txt -e '.[docs]'
	@touch $@

.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --progress-bar off -q -c constraints.txt -e '.[dev]'
	@touch $@ .venv/.plots .venv/.docs
