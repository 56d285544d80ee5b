# Needs only make and Python 3.11 or newer: every target makes the environment that it runs in.
#   make demo     what quantization does to the features of a small model's SAE, on this machine
#   make test     format, lint, types and tests (JOBS=2 runs the tests in two processes)
#   make peers    the comparisons with PyTorch tools, in an environment of their own
# PYTHON=... names the Python to build on, VENV=... the environment (made when it is not there).

VENV ?= .venv
PEERS_VENV ?= .venv-peers
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c '$(IS_NEW)' >/dev/null 2>&1 && echo $$p && break; done)
JOBS ?= 0
DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH ?= $(wildcard experiments/bench_*.py)

BIN := $(VENV)/bin
BASE := $(VENV)/.installed-base
TEST := $(VENV)/.installed-test
PEERS := $(PEERS_VENV)/.installed-peers
INPUTS := pyproject.toml constraints.txt
INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
IS_NEW := import sys; sys.exit(sys.version_info < (3, 11))

# The bundled pyright asks the network only whether a newer one is out.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test lint format peers bench clean

help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

demo: $(BASE)
	$(BIN)/qsae demo $(DEMO_ARGS)

test: lint
	$(BIN)/pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

lint: $(TEST)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(TEST)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Other people's packages warn as they like: there a warning is no error.
peers: $(PEERS)
	$(PEERS_VENV)/bin/pytest -W default $(PYTEST_ARGS) tests/peers

bench: $(TEST)
	@test -n "$(BENCH)" || { echo "make bench: there is no experiments/bench_*.py" >&2; exit 1; }
	@for file in $(BENCH); do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf .venv .venv-peers build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp an install: it is made again only when what it was made from has changed.
$(BASE): $(INPUTS) | $(BIN)/python
	$(BIN)/python $(INSTALL) --editable .
	@touch $@

$(TEST): $(INPUTS) | $(BIN)/python
	$(BIN)/python $(INSTALL) --editable '.[test]'
	@touch $(BASE) $@

$(PEERS): $(INPUTS) | $(PEERS_VENV)/bin/python
	$(PEERS_VENV)/bin/python $(INSTALL) --editable '.[peers]' pytest pytest-xdist hypothesis
	@# PyPI's torchvision does not load beside a CPU build of torch, and then transformers does not either.
	@$(PEERS_VENV)/bin/python -c 'import torchvision' 2>/dev/null || \
	$(PEERS_VENV)/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@

# $(call refuse,why): one line that names the remedy.
refuse = { echo "make: $(1)" >&2; exit 1; }

%/bin/python:
	@test -n "$(PYTHON)" || $(call refuse,no Python 3.11 or newer runs here. Install python3.11$(comma) or name one: make PYTHON=/path/to/python3.11)
	@"$(PYTHON)" -c '$(IS_NEW)' 2>/dev/null || $(call refuse,$(PYTHON) is not a Python 3.11 or newer that runs. Name another: make PYTHON=/path/to/python3.11)
	@if "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null; then maker=venv; \
	elif "$(PYTHON)" -m virtualenv --version >/dev/null 2>&1; then maker=virtualenv; \
	else $(call refuse,$(PYTHON) can make no environment. Install its venv module (Debian and Ubuntu: apt install python3.11-venv)$(comma) or virtualenv); fi; \
	test -e "$*" && fresh= || fresh=yes; \
	"$(PYTHON)" -m $$maker "$*" || { test -z "$$fresh" || rm -rf "$*"; exit 1; }

comma := ,
