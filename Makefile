# nanoGFT: `make train` and `make test` set everything up on their first run. `make` alone lists the targets.
#
#   make train ARGS="--bits 4 --k 0.1"      any key of `python train.py --help`
#   make train PYTHON=python3.12            the Python that .venv is made with
#   make gpu VENV_PYTHON=python3            a Python that has everything already: nothing is installed

PYTHON ?= python3
ARGS ?=
VENV_PYTHON := .venv/bin/python
# Touched only after a complete install: an interrupted one has no stamp and is taken up again.
STAMP := .venv/installed
READY := $(if $(filter .venv/bin/python,$(VENV_PYTHON)),$(STAMP))

.DEFAULT_GOAL := help
.PHONY: help setup train test fuzz gpu clean

help: ## list the targets
	@sed -n 's/^\([a-z][a-z-]*\):.*## */  make \1@/p' Makefile | awk -F@ '{ printf "%-20s %s\n", $$1, $$2 }'

setup: $(STAMP) ## make .venv and install requirements.txt, once

train: $(READY) ## train configs/shakespeare_char_small.toml; more settings through ARGS="--key value"
	@exec $(VENV_PYTHON) train.py configs/shakespeare_char_small.toml $(ARGS)

test: $(READY) ## run the tests; pytest's options through ARGS="-k config"
	@OMP_NUM_THREADS=1 exec $(VENV_PYTHON) -m pytest -q -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

fuzz: $(READY) ## feed the readers 30,000 mutated inputs; ARGS="data --cases 500": some
	@OMP_NUM_THREADS=1 exec $(VENV_PYTHON) -m tests.fuzz $(ARGS)

gpu: $(READY) ## tests, benchmarks and trainings on a GPU, into results/gpu; ARGS=--rehearse: tiny, on the CPU
	@status=0; for part in A B C; do $(VENV_PYTHON) -m experiments.gpu $$part $(ARGS) || status=1; done; exit $$status

clean: ## remove .venv and caches; out/, the trained models, stays
	rm -rf .venv .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): requirements.txt
	@command -v $(PYTHON) >/dev/null || { \
	    echo "error: no $(PYTHON) found; install Python 3.11 or newer," \
	         "or name it: make setup PYTHON=/path/to/python3" >&2; \
	    exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), and Python 3.11 or newer is needed;" \
	         "name one: make setup PYTHON=python3.12" >&2; \
	    exit 1; }
	@rm -f $@
	@echo "Setting up .venv, once: PyTorch is a large download"
	$(PYTHON) -m venv .venv
	$(VENV_PYTHON) -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@
