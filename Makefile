# Two commands for a newcomer: `make demo` and `make test`. Each first makes the virtual environment if it is missing or older than
# the files it is made from. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
PROMPT ?= a blue chair
OUT ?= outputs/demo
WORKERS ?= 2
DIST ?= dist
JOBS ?= 2
SITE ?= build/site

# torch is installed first and alone, so that another build of it can be chosen and nothing after replaces it:
#   make demo TORCH="--extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu"
# A value given here is remembered in the environment; without one, an existing environment keeps the torch it has.
GIVEN_TORCH := $(TORCH)
TORCH ?= torch==2.13.0
# The other packages have the versions that the tests ran with, on Python 3.11 or later. `make env PINS=` takes what pip finds, as
# Python 3.10 and older releases of torch need (`make test-torch` has its own environment).
PINS ?= --constraint constraints.txt

BIN := $(VENV)/bin
STAMP := $(VENV)/installed
INPUTS := Makefile constraints.txt pyproject.toml integrations/pyproject.toml

ifneq ($(GIVEN_TORCH),)
ifneq ($(GIVEN_TORCH),$(shell cat $(VENV)/torch.txt 2>/dev/null))
.PHONY: $(STAMP)
endif
endif

# One thread per process: with several workers on few cores, more threads are slower, and results stay the same from run to run.
export OMP_NUM_THREADS ?= 1
# Several test processes, each file in one of them.
together = --numprocesses $(JOBS) --dist loadfile --benchmark-disable
# Fonts, models and the like are cached in the repository, never in the home directory.
run = XDG_CACHE_HOME="$(CURDIR)/.cache" MPLCONFIGDIR="$(CURDIR)/.cache/matplotlib"

.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow test-torch test-matrix nightly bench docs lint format types wheels check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:[^#]*## /\t/' | expand -t 12

env: $(STAMP)  ## make the virtual environment (PYTHON=python3.12, TORCH="torch==...", VENV=dir)

$(STAMP): $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, $(if $(PINS),11,10)))' || { \
	  echo "$(PYTHON) is older than Python 3.$(if $(PINS),11,10) or missing; name another one: make PYTHON=python3.12 ...$(if $(PINS), (make PINS= ... takes 3.10))" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PINS) $(TORCH)
	$(BIN)/python -m pip install --quiet $(PINS) --editable '.[dev]' --editable ./integrations
	@echo '$(TORCH)' > $(VENV)/torch.txt
	@touch $@

demo: $(STAMP)  ## a 3D object from a text prompt, on two worker processes (PROMPT="a red cube", OUT=dir, WORKERS=n)
	$(run) $(BIN)/picardopt text-to-3d "$(PROMPT)" --out "$(OUT)" --workers $(WORKERS) --overwrite

test: $(STAMP)  ## the tests, without those that take long or need an accelerator, in JOBS=2 processes
	$(run) $(BIN)/python -m pytest -m "not slow and not gpu" --durations=10 $(together)

test-slow: $(STAMP)  ## the long tests, the benchmarks' smoke among them, in JOBS=2 processes
	$(run) $(BIN)/python -m pytest -m "slow and not gpu" --durations=10 $(together)

nightly: test-slow  ## the long tests, and the property tests on random examples (what fails is kept in .hypothesis/)
	$(run) $(BIN)/python -m pytest -m "hypothesis and not gpu" --hypothesis-profile=nightly --timeout=1800 --durations=10 $(together)
	$(run) $(BIN)/python -m pytest tests/test_readme.py tests/test_doc_blocks.py tests/frameworks/test_page.py

test-torch:  ## the core's tests on another torch, in an environment of its own (TORCH="torch==2.6.0", PYTHON=python3.12, TESTS="-x tests/test_theorem.py")
	.ci/test-torch $(PYTHON) $(TORCH)

test-matrix:  ## the same on every line of .ci/versions: the lowest versions, two between, the newest
	.ci/test-torch

bench: $(STAMP)  ## cost of rollout, snapshot and commit, and the overhead of a sweep
	@mkdir -p .benchmarks
	$(run) $(BIN)/python -m pytest benchmarks --benchmark-json=.benchmarks/rollout.json
	$(run) $(BIN)/python benchmarks/tables.py .benchmarks/rollout.json benchmarks/results/rollout.md
	$(run) $(BIN)/python benchmarks/overhead.py --out benchmarks/results/overhead.md

docs: $(STAMP)  ## the documentation as a site, in SITE=build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir "$(abspath $(SITE))"

lint: $(STAMP)  ## ruff: rules and format; which module may import which (.importlinter)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)  ## mypy --strict on both packages and on what tests share
	$(BIN)/mypy --strict picardopt integrations/picardopt_3d
	$(BIN)/mypy --strict tests/helpers tests/golden tests/integrations/helpers

wheels: $(STAMP)  ## source archives and wheels of both distributions, in DIST=dist
	$(BIN)/python -m build --outdir $(DIST) .
	$(BIN)/python -m build --outdir $(DIST) integrations

check: lint types test  ## what every commit must pass

clean:  ## remove the environment, caches and builds (not outputs/)
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks build dist
