# From a fresh clone on: `make test`, `make compare`. They make .venv, install requirements-dev.txt, build and run.
#   make test VENV=~/env     the same in a virtual environment elsewhere
#   make test PY=python3     with what that Python has; installs nothing

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PY := $(VENV)/bin/python
COMPARE := build/compare
RESULT = benchmarks/results/$(shell date +%F)-$(or $(NAME),$(error make results NAME=cpu-epyc-avx512: device and machine))

ifneq ($(origin PY),command line)
REQUIREMENTS := $(VENV)/.requirements
EDITABLE := $(VENV)/.editable
endif

# With the package of this tree, whatever else is installed.
RUN := PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PY)

.PHONY: test compare bench results build wheel lint format clean gpu cuda-report mutants

test: build $(EDITABLE)
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile

compare: build $(EDITABLE)
	$(RUN) benchmarks/compare.py --json $(COMPARE)/compare.json --plot $(COMPARE) $(ARGS)

# The same cases under pytest-benchmark; every run is kept, `pytest-benchmark compare` sets them side by side.
bench: build $(EDITABLE)
	$(RUN) -m pytest benchmarks --benchmark-autosave --benchmark-storage=file://build/bench

# A dated result, on a machine that does nothing else, and the README's tables and pictures from it:
#   make results NAME=cpu-epyc-avx512    ARGS="--threads 1" and the like go to compare.py, here and in make compare
results: build $(EDITABLE)
	$(RUN) benchmarks/compare.py --suite all --sweep classes --sweep rows --baselines eager,compile \
	    --json $(RESULT)/results.json --plot $(RESULT) $(ARGS)
	$(RUN) benchmarks/readme_table.py

build: $(REQUIREMENTS)
	$(PY) setup.py --quiet build_ext --inplace

# Installs nothing: on a machine with a GPU, the Python that has PyTorch, `make gpu PYTHON=python3`.
gpu:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) benchmarks/gpu.py

cuda-report: $(REQUIREMENTS)
	$(PY) benchmarks/cuda_report.py --write

# A minute or two each.
mutants: $(REQUIREMENTS)
	$(RUN) tests/cuda_on_cpu/mutants.py

wheel: $(REQUIREMENTS)
	rm -rf dist
	$(PY) setup.py --quiet sdist
	$(PY) -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .
	@ls -l dist

lint: $(REQUIREMENTS)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror $(CSRC)

format: $(REQUIREMENTS)
	$(PY) -m ruff check --fix
	$(PY) -m ruff format
	$(CLANG_FORMAT) -i $(CSRC)

clean:
	rm -rf build dist *.egg-info fused_losses/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

CLANG_FORMAT = $(or $(wildcard $(VENV)/bin/clang-format),clang-format)
CSRC = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.requirements: requirements-dev.txt | $(VENV)/bin/python
	$(PY) -m pip install --no-compile --requirement requirements-dev.txt
	touch $@

$(VENV)/.editable: pyproject.toml setup.py $(VENV)/.requirements | build
	$(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@
