# `make test PIP_ARGS="--index-url URL"` passes options to every pip call, `PYTHON=python3.12` picks the interpreter.
PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
# 0 runs the tests in one process, as --pdb needs it.
PYTEST_WORKERS ?= auto
DEMO_ARGS ?=
BENCH_JSON ?= build/benchmark.json
# An interpreter that has torch, Triton and the packages of the extra `bench` already: nothing is installed then.
PYTHON_GPU ?=
BENCH_GPU_ARGS ?= --budget-minutes 25
BENCH_CPU_ARGS ?=

BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
# By file, so that what a file's tests share is made once; one thread for each process.
PYTEST_TESTS := OMP_NUM_THREADS=1 $(PYTEST) -n $(PYTEST_WORKERS) --dist loadfile
# A process of its own: nothing compiles ahead of time where kernels are interpreted.
PYTEST_KERNELS := ACS_TRITON_BACKEND=triton $(PYTEST_TESTS) tests/kernels
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

.PHONY: demo test test-slow test-all lint bench bench-cpu bench-gpu clean
.NOTPARALLEL:

demo: .venv/.installed-demo
	$(BIN)/acs-triton demo $(DEMO_ARGS)

test: .venv/.installed-test
	$(PYTEST_TESTS) -m "not slow" $(PYTEST_ARGS)
	$(PYTEST_KERNELS) -m "not slow" $(PYTEST_ARGS)

# pytest exits with 5 where no test is slow.
test-slow: .venv/.installed-test
	$(PYTEST_TESTS) -m slow $(PYTEST_ARGS) || test $$? -eq 5
	$(PYTEST_KERNELS) -m slow $(PYTEST_ARGS) || test $$? -eq 5

test-all: .venv/.installed-test
	$(PYTEST_TESTS) $(PYTEST_ARGS)
	$(PYTEST_KERNELS) $(PYTEST_ARGS)

lint: .venv/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# A benchmark may tune and compile for longer than any test should take.
bench: .venv/.installed-bench
	mkdir -p $(dir $(BENCH_JSON))
	$(PYTEST) bench -o timeout=0 --benchmark-only --benchmark-json=$(BENCH_JSON) $(PYTEST_ARGS)

# The table of the README, about half an hour on two cores: JSON and a chart in bench/results.
bench-cpu: .venv/.installed-bench
	$(BIN)/python -m bench.cpu_table $(BENCH_CPU_ARGS)

# All that needs a GPU, within a budget, from tests/gpu to training: tables, and one JSON in bench/results. In several
# calls: BENCH_GPU_ARGS="--budget-minutes 25 --call-minutes 9.5", again and again.
bench-gpu: $(if $(PYTHON_GPU),,.venv/.installed-bench)
	$(or $(PYTHON_GPU),$(BIN)/python) -m bench.gpu $(BENCH_GPU_ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

# torch comes first and alone, so that an index given in PIP_ARGS decides which build the rest is resolved against.
.venv/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) torch
	@touch $@

.venv/.installed-%: .venv/.torch pyproject.toml setup.py
	$(INSTALL) -e '.[$*]'
	@touch $@
