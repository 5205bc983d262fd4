# make results   install, run the evaluation of the demo with both attention kernels, draw its figures
# make figures   install, draw the figures of the results that the project shows
# make test      install, run the tests (test-slow: those that take long)
# make lint      install, check style and types
# make test-matrix  the core tests under every version of Transformers from 4.56 on (installs each, takes long)
#
# On a CPU, times are right only where nothing else runs.
#
# Uses the virtual environment that is active, else makes one in .venv.

PYTHON ?= python3
ENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
BIN := $(ENV)/bin
# Files of tests go to this many processes of one thread each; one process where a GPU is to be shared: make test WORKERS=0
WORKERS ?= 2
# Threads that wait sleep: else a run beside other programs takes many times as long.
export OMP_WAIT_POLICY = passive
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
# Says which checkout was installed into the environment last, and when.
INSTALLED := $(ENV)/.streaming-llm-installed
ifneq ($(shell cat $(INSTALLED) 2>/dev/null),$(CURDIR))
.PHONY: $(INSTALLED)
endif

.PHONY: help install results figures test test-slow test-all test-matrix lint format clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make\)/\1/p' Makefile
	@echo "also: install test-slow format clean"

$(BIN)/python:
	$(PYTHON) -m venv $(ENV)

$(INSTALLED): requirements.txt pyproject.toml | $(BIN)/python
	@echo "installing into $(ENV): a few minutes, PyTorch is large"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@printf '%s' '$(CURDIR)' > $@

install: $(INSTALLED)

results: $(INSTALLED)
	$(BIN)/python experiments/run_final_experiments.py --attn-backend-list math flash
	$(BIN)/python experiments/plot_all.py --runs own

figures: $(INSTALLED)
	$(BIN)/python experiments/plot_all.py --runs project

test: $(INSTALLED)
	$(PYTEST) -m "not slow"

test-slow: $(INSTALLED)
	$(PYTEST) -m slow

test-matrix: $(INSTALLED)
	$(BIN)/python scripts/test_matrix.py $(MATRIX)

test-all: $(INSTALLED)
	$(PYTEST)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-matrix build *.egg-info .mypy_cache .pytest_cache .ruff_cache results/final results/fixed_eval results/.cells
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
