# make demo      merge a real sentence encoder, and compare sentence embeddings before and after
# make test      run the tests
# make test-all  the long tests as well
# make golden  pin the output bytes of all golden merges again
# make check     lint, format, packaging and types
# make compat    run the same configurations with mergekit 0.1.5 and with mergeloom, and compare the models
# make soak      merges with kills, full disks and damaged files, and of every causal LM class of transformers: up to two hours
# make bench     mergeloom compared with mergekit and the floor, on Llama-3.2-1B shapes: 10 GB of disk, an hour or two
# make packages  install and try the wheel and the sdist with each of PYTHONS
# make coverage  run the tests and measure branch coverage: above 90% for engine, methods and io
# make mutants   mutation tests of the scheduler and the selection
# make clean     remove everything that make has created here, except the benchmarks' models
#
# Each target creates the environment that it needs: most use VENV, .venv by default. PYTHON chooses the interpreter (3.11
# or newer). pip's own settings choose the package index: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gives the
# CPU build of torch.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help demo test test-all golden check compat soak bench packages coverage mutants clean

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; \
	done)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
MADE := $(VENV)/made-by-make
BENCH_MODELS ?= $(HOME)/.cache/mergeloom-bench/1b
BENCH_DISK ?= $(HOME)/.cache/mergeloom-bench
BENCH_RUNS ?= 3
WORKERS ?= auto

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "mergeloom needs Python 3.11 or newer, with venv: make PYTHON=/path/to/python3.11"; exit 2; }
	@test ! -e $(VENV) || test -e $(READY) || test -e $(MADE) || { \
		echo "$(VENV) is an environment that make did not create: move it, or choose another one: make VENV=.venv-dev"; \
		exit 2; }
	@echo "Setting up $(VENV) with $(PYTHON): once, a minute or more."
	$(PYTHON) -m venv $(VENV)
	touch $(MADE)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-build-isolation \
		-e '.[test,check,demo]'
	touch $@

demo: $(READY)
	$(BIN)/python recipes/demo_encoder.py build/demo

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal -m "not slow"

test-all: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

# Only for a change that is meant to alter output bytes: see tests/support/golden.py.
golden: $(READY)
	$(BIN)/python -m tests.support.golden

# The wheel is built and its command is run from another environment, which borrows the libraries of the first: so the
# packaging is checked too.
check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict -p mergeloom
	$(BIN)/mypy --strict tests/support/scripts/typed.py
	rm -rf build/check
	$(BIN)/python -m build --no-isolation --outdir build/check . >build.log 2>&1 || { cat build.log; exit 1; }
	rm build.log
	$(BIN)/python -m venv --clear --without-pip .venv-check
	$(BIN)/python -m pip --python .venv-check/bin/python install -qq --disable-pip-version-check --no-deps \
		build/check/*.whl
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
		>"$$(.venv-check/bin/python -c 'import site; print(site.getsitepackages()[0])')/libraries.pth"
	cd build/check && ../../.venv-check/bin/mergeloom --help >help.txt
	cd build/check && ../../.venv-check/bin/python -c 'import mergeloom.engine.run.merge, mergeloom.methods.registry'

soak: $(READY)
	$(BIN)/python -m benchmarks.soak

# MERGEKIT_ENV names an environment that has mergekit already.
MERGEKIT_ENV ?= .venv-mergekit
.venv-mergekit/ready: constraints.txt
	@echo "Setting up .venv-mergekit with $(PYTHON): once, a minute or more."
	$(PYTHON) -m venv .venv-mergekit
	.venv-mergekit/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
		torch==2.13.0 mergekit==0.1.5
	touch $@

compat: $(READY) $(if $(filter .venv-mergekit,$(MERGEKIT_ENV)),.venv-mergekit/ready)
	MERGEKIT_ENV=$(MERGEKIT_ENV) $(BIN)/python -m pytest tests/integration/test_mergekit.py tests/integration/vocabularies/test_compat.py

bench: $(READY) $(if $(filter .venv-mergekit,$(MERGEKIT_ENV)),.venv-mergekit/ready)
	$(BIN)/python -m benchmarks.make_models $(BENCH_MODELS)
	$(BIN)/python -m benchmarks.compare --models $(BENCH_MODELS) --mergekit $(MERGEKIT_ENV) --runs $(BENCH_RUNS)
	$(BIN)/python -m benchmarks.compare --models $(BENCH_MODELS) --mergekit $(MERGEKIT_ENV) --runs $(BENCH_RUNS) \
		--disk $(BENCH_DISK)
	$(BIN)/python -m benchmarks.compare --models $(BENCH_MODELS) --mergekit $(MERGEKIT_ENV) --runs $(BENCH_RUNS) \
		--cold --methods linear slerp task_arithmetic model_stock passthrough
	$(BIN)/python -m benchmarks.passthrough --models $(BENCH_MODELS) --disk $(BENCH_DISK)
	$(BIN)/python -m benchmarks.overhead --models $(BENCH_MODELS) --out $(BENCH_DISK)
	$(BIN)/python -m benchmarks.budgets --models $(BENCH_MODELS)
	$(BIN)/python -m benchmarks.scaling --models $(BENCH_MODELS)
	$(BIN)/python -m benchmarks.gpu --mergekit $(MERGEKIT_ENV)
	$(BIN)/python -m benchmarks.bars
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt matplotlib
	$(BIN)/python -m benchmarks.plots
	$(BIN)/python -m benchmarks.picture --models $(BENCH_MODELS)

PYTHONS ?= $(PYTHON)
packages: $(READY)
	rm -rf build/packages
	$(BIN)/python -m build --no-isolation --outdir build/packages . >build.log 2>&1 || { cat build.log; exit 1; }
	rm build.log
	cp tests/support/scripts/packaged.py constraints.txt build/packages/
	cd build/packages && for python in $(PYTHONS); do for package in *.whl *.tar.gz; do \
		$$python -m venv --clear try; \
		try/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt ./$$package; \
		try/bin/python packaged.py; \
	done; done

coverage: $(READY)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --skip-covered
	for folder in engine methods io; do \
		echo "$$folder: $$($(BIN)/coverage report --include="$$folder/*" --format=total --fail-under=90)%"; done

mutants: $(READY)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt cosmic-ray
	$(BIN)/python -m tests.support.scripts.mutate

clean:
	if test -e $(READY) || test -e $(MADE); then rm -rf $(VENV); fi
	rm -rf .venv-check .venv-mergekit build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
