# Each target makes .venv by itself when it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: demo test test-fast check format docs bench clean

demo: .venv/installed  ## learn Python from its standard library, then complete code; about five minutes on two cores
	@BIN=$(BIN) sh scripts/demo.sh

test: .venv/installed-dev  ## the whole test suite, offline
	$(BIN)/python -m pytest --numprocesses=auto

test-fast: .venv/installed-dev  ## what runs in under a minute
	$(BIN)/python -m pytest --numprocesses=auto -m "not slow"

check: .venv/installed-dev  ## lint, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m groundup.config.reference | diff docs/reference/options.md -

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/installed-dev  ## regenerate the option reference, and build the site; a warning is an error
	$(BIN)/python -m groundup.config.reference > docs/reference/options.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "the site: build/site/index.html"

bench: .venv/installed-dev  ## speed of training and generation against peers, quick version
	$(PIP) -e '.[bench]'
	$(BIN)/python benchmarks/training.py --quick
	$(BIN)/python benchmarks/generation.py --quick

clean:
	rm -rf .venv demo

.venv/installed: pyproject.toml constraints.txt
	@echo "setting up .venv (once, about a minute)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "groundup needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) -e .
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "adding the tools for tests and checks"
	@$(PIP) -e '.[test,dev,docs]'
	@touch $@
