# Everything runs from a fresh clone: `make demo` and `make test` set up .venv first. Needs Python 3.10+, pip and make.
PYTHON ?= python3
BIN := .venv/bin
# The trainer never looks anything up on the Hub here: the demo and the tests make what they need.
export HF_HUB_OFFLINE := 1

.PHONY: setup demo test test-slow lint docs bench gpu clean

setup: .venv/installed

PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt

.venv/installed: pyproject.toml setup.py .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable '.[dev]'
	touch $@

.venv/docs: .venv/installed
	$(PIP) --editable '.[docs]'
	touch $@

demo: setup
	$(BIN)/python recipes/demo/run.py

# One worker a core: a test itself takes one thread.
test: setup
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

test-slow: setup
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m slow

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site, in build/site; Python 3.11+. `make docs DOCS=serve` shows it at http://127.0.0.1:8000 and follows changes.
DOCS ?= build
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(DOCS) --config-file docs/site/mkdocs.yml

bench: setup
	$(BIN)/python -m bench loss --op policy_gradient --shape 1536,576,49152 --head trainable
	$(BIN)/python -m bench loss --op policy_gradient --shape 1536,576,49152 --head frozen

# Needs a GPU and no setup: runs with $(PYTHON) from the checkout. OUT=folder, WHEELS=folder, CACHE=folder, PAIR=folder,
# DRY_RUN=1: see docs/testing.md.
OUT ?= runs/gpu
gpu:
	$(PYTHON) -m bench gpu --out $(OUT) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(CACHE),--cache $(CACHE)) $(if $(PAIR),--pair $(PAIR)) $(if $(DRY_RUN),--dry-run)

clean:
	rm -rf .venv build dist *.egg-info
