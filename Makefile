# Everything runs inside .venv, which the first target that needs it creates. A stamp for each set of extras remembers what
# pyproject.toml asked for, so a second run installs nothing.
#   make PYTHON=python3.12 test    with another interpreter
#   make TORCH=cpu train           with PyTorch's CPU-only wheels, in .venv-cpu: no CUDA libraries
PYTHON ?= python3
TORCH ?=
COMMA := ,
CPU_WHEELS ?= https://download.pytorch.org/whl/cpu
VENV := .venv$(if $(TORCH),-$(TORCH))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
EXTRAS := train test bench docs dev integrations
STAMPS := $(EXTRAS:%=$(VENV)/.%)
QUIET := $(if $(CI),--quiet) # elsewhere pip shows the downloads' progress
SPHINX := $(BIN)/python -m sphinx -W --keep-going -q docs build/docs
PYTEST := $(BIN)/python -m pytest -n auto $(if $(CI),,-q)

ifneq ($(filter-out cpu,$(TORCH)),)
$(error TORCH must be cpu, or empty for what PyPI has; got '$(TORCH)')
endif

SIZE := $(if $(TORCH),about 0.4 GB to download and 1.3 GB of disk$(COMMA) the tests twice that,about 3 GB to download and 5.5 GB of disk on Linux)
INSTALL = $(PIP) install $(QUIET) --editable '.[$*]'
ifeq ($(TORCH),cpu) # an extra's packages alone: the package itself would bring Triton, twice as large as all the others
INSTALL = $(PIP) install $(QUIET) torch torchvision --index-url $(CPU_WHEELS) \
    && $(PIP) install $(QUIET) --no-deps --editable . \
    && $(BIN)/python -c '$(REQUIREMENTS)' > $(VENV)/requirements.txt && $(PIP) install $(QUIET) -r $(VENV)/requirements.txt
REQUIREMENTS = from importlib.metadata import requires; from pip._vendor.packaging.requirements import Requirement; \
    print(*(str(it).split(";")[0] for it in map(Requirement, requires("softmax-fused")) if it.marker \
    and it.marker.evaluate({"extra": "$*"}) and not it.marker.evaluate({"extra": ""})), sep="\n")
endif
define UNFINISHED

The set-up is not complete. `make $(MAKECMDGOALS)` goes on where it stopped: what has been downloaded is in pip's cache.
Without a network, fetch the wheels on a machine of the same kind (python -m pip download --dest WHEELS '.[$*]' setuptools),
bring that folder here and run PIP_NO_INDEX=1 PIP_FIND_LINKS=WHEELS make $(MAKECMDGOALS).

endef
export UNFINISHED

.PHONY: help train test test-slow test-all test-cpu test-integrations hub check docs mutants \
    bench bench-cpu bench-gpu bench-host bench-plot clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "softmax_fused needs Python 3.10 or newer; %s is %s: run make PYTHON=python3.12" % (sys.executable, sys.version.split()[0]))'
	$(PYTHON) -m venv --clear $(VENV)

$(STAMPS): $(VENV)/.%: pyproject.toml | $(BIN)/python
	@echo "Installing PyTorch and the packages of '$*' into $(VENV), once: $(SIZE), 2 to 10 minutes."
	@trap : INT; { $(PIP) install --quiet --upgrade pip && $(INSTALL); } || { echo "$$UNFINISHED" >&2; exit 1; }
	@touch $@

train: $(VENV)/.train ## train softmax regression on Fashion-MNIST with the fused loss: a quarter of a minute
	@echo "Training softmax regression on Fashion-MNIST (30 MB, downloaded once): 10 epochs, about 15 seconds on two cores."
	@echo "Look at curves.png, predictions.png and confusion.png in the folder that it names at the end."
	$(BIN)/softmax-fused train $(ARGS)
	@echo "Next: $(BIN)/softmax-fused compare        (this loss, torch's and the textbook's side by side)"
	@echo "      $(BIN)/softmax-fused                (all commands, with an example of each)"

test: $(VENV)/.test ## the tests of everything essential on the CPU, kernels in Triton's interpreter: five minutes
	@echo "Running the tests, the kernels in Triton's interpreter: about 5 minutes on two cores."
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(VENV)/.test ## the other tests: more cases, compilation for four GPUs and the CPU, several processes: nine minutes
	@echo "Running the slow tests: about 9 minutes on two cores."
	$(PYTEST) -m slow $(ARGS)

test-all: test test-slow ## every test

test-cpu: $(VENV)/.test ## every test of the compiled CPU backend: four minutes at first, three later
	$(PYTEST) -k "compiled or numba" $(ARGS)

test-integrations: $(VENV)/.test $(VENV)/.integrations ## docs/integrations.md with every library that it names: two minutes
	$(PYTEST) tests/test_integrations.py tests/test_recipes.py tests/test_hub.py tests/test_causal_lm.py $(ARGS)

hub: ## write the kernel for Hugging Face's kernels into build/; ARGS=FOLDER elsewhere
	@$(PYTHON) hub/build.py $(ARGS)

check: $(VENV)/.dev ## formatting, lint, types, the documentation without warnings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(SPHINX)

docs: $(VENV)/.docs ## the documentation as a site in build/docs, without a network: ten seconds
	$(SPHINX)
	@echo "Open build/docs/index.html."

mutants: $(VENV)/.test ## plant bugs, one at a time, and see a test catch each: half an hour
	$(BIN)/python -m tests.mutants $(ARGS)

bench: $(VENV)/.bench ## pytest-benchmark suites on the CPU; ARGS="-k 'both and 32000'" picks some
	$(BIN)/python -m pytest -q bench --benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-sort=name $(ARGS)

bench-cpu: $(VENV)/.bench ## the tables of the CPU, four minutes on an idle machine
	$(BIN)/python -m bench.cpu $(ARGS)

# RIVALS names a folder with unpacked wheels (python -m zipfile -e liger_kernel.whl FOLDER), where pip cannot install them
bench-gpu: export PYTHONPATH := $(if $(RIVALS),$(abspath $(RIVALS)):)$(PYTHONPATH)
bench-gpu: ## GPU tests and every benchmark, eight minutes, under any python with torch and triton: no installs, no network
	@$(PYTHON) -m bench.gpu $(ARGS)

bench-host: $(VENV)/.bench ## what a call costs the host, without a GPU too: a minute on an idle machine
	$(BIN)/python -m bench.host $(ARGS)

bench-plot: $(VENV)/.bench ## the tables and figures of speed in docs and README, from bench/results
	$(BIN)/python -m bench.plot $(ARGS)

clean: ## remove what the targets made, except runs/
	rm -rf .venv .venv-cpu build dist *.egg-info .*_cache .benchmarks .hypothesis
