# Everything runs inside .venv, which the first target that needs it creates; `make PYTHON=python3.12 test` picks another
# interpreter. A stamp a set of extras remembers what pyproject.toml asked for, so a second run installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := train test bench dev
STAMPS := $(EXTRAS:%=$(VENV)/.%)

.PHONY: help train test check mutants bench bench-cpu bench-gpu bench-plot clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "softmax_fused needs Python 3.10 or newer; %s is %s: run make PYTHON=python3.12" % (sys.executable, sys.version.split()[0]))'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(STAMPS): $(VENV)/.%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

train: $(VENV)/.train ## train softmax regression on Fashion-MNIST with the fused loss
	$(BIN)/softmax-fused train $(ARGS)

test: $(VENV)/.test ## the whole test suite on the CPU, kernels through Triton's interpreter
	$(BIN)/python -m pytest -n auto $(ARGS)

check: $(VENV)/.dev ## formatting, lint, types, and the package as users get it
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_package.py

mutants: $(VENV)/.test ## plant bugs, one at a time, and see a test catch each (over an hour)
	$(BIN)/python -m tests.mutants $(ARGS)

bench: $(VENV)/.bench ## pytest-benchmark suites on the CPU; ARGS="-k 'both and 32000'" picks some
	$(BIN)/python -m pytest -q bench --benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-sort=name $(ARGS)

bench-cpu: $(VENV)/.bench ## README's table for the CPU, four minutes on an idle machine
	$(BIN)/python -m bench.cpu $(ARGS)

# RIVALS names a folder with unpacked wheels (python -m zipfile -e liger_kernel.whl FOLDER), where pip cannot install them
bench-gpu: export PYTHONPATH := $(if $(RIVALS),$(abspath $(RIVALS)):)$(PYTHONPATH)
bench-gpu: ## GPU tests, then the table, under any python with torch and triton: no installs, no network
	$(PYTHON) -m pytest -m gpu -q tests; tests=$$?; $(PYTHON) -m bench.gpu $(ARGS) && exit $$tests

bench-plot: $(VENV)/.bench ## README's tables and figures of speed, from bench/results
	$(BIN)/python -m bench.plot $(ARGS)

clean: ## remove what the targets made, except runs/
	rm -rf $(VENV) build dist *.egg-info .*_cache .benchmarks .hypothesis
