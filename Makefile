# `make demo` and `make test` set up everything they need in .venv; the second time they find it done.
#
#   PYTHON     interpreter that creates .venv, 3.10 or newer
#   PIP_ARGS   for every pip install: off Linux nothing; on Linux without a GPU
#              PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu' saves gigabytes of CUDA libraries
#   STRICT=1   a missing prerequisite (compiler, optional package) is a failure, not a skip
#   ARGS       handed to pytest, the demo or the benchmark
PYTHON ?= python3
PIP_ARGS ?=
STRICT ?=
ARGS ?=
WORKERS ?= 2

BIN := .venv/bin
READY := .venv/.ready
BUILT := zoact_kernels/_build.json
SOURCES := setup.py $(wildcard csrc/*.* csrc/cpu/*.* csrc/cuda/*.*)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt $(PIP_ARGS)
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(if $(STRICT),--strict-prerequisites)
# Waiting threads sleep: on a machine with other work, spinning ones made two threads three times slower than one; on an
# idle one the step takes the same time either way.
export OMP_WAIT_POLICY ?= passive
export ZOACT_BUILD_CPU ?= $(if $(STRICT),1,auto)
# Minutes for nothing without a GPU: tests compile csrc/cuda themselves, for the CPU. ZOACT_BUILD_CUDA=1 make ... does it.
export ZOACT_BUILD_CUDA ?= 0

.PHONY: setup build test soak sanitize check format demo bench bench-peers every-method bench-gpu test-gpu gpu-report clean
.DELETE_ON_ERROR:

setup: $(READY)
build: $(BUILT)

test: $(BUILT)
	$(PYTEST) $(ARGS)

soak: $(BUILT)
	$(PYTEST) -m "" $(ARGS)

# The kernel calls of these tests again, without Python, under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(BUILT)
	rm -rf build/sanitize
	$(PYTEST) --quiet tests/test_dequantize.py tests/test_zo_*.py --dump-calls build/sanitize $(ARGS)
	$(BIN)/python tests/sanitize.py build/sanitize $(WORKERS)

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

demo: $(BUILT)
	$(BIN)/zoact demo $(ARGS)

bench: $(BUILT)
	$(BIN)/python -m benchmarks.run $(ARGS)

# Every row of `zoact methods` from the command line for 20 steps (an hour or two); goes on where it was stopped.
every-method: $(BUILT)
	$(BIN)/python -m benchmarks.every_method $(ARGS)

# The libraries that the benchmark compares with; nothing else needs them.
bench-peers: $(READY)
	$(PIP) --no-deps -r benchmarks/peers.txt

# On a machine with a GPU: PYTHON as found (torch, Triton), no .venv, no network, each within 9 minutes and with one
# results file: benchmarks/results/gpu-<device>.jsonl and tests-gpu-<device>.json.
bench-gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

test-gpu:
	$(PYTHON) tests/gpu_lane.py $(ARGS)

# What the machine code says a GPU would need, without one: benchmarks/results/gpu_report.md, .json, .png.
gpu-report:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_report $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache $(BUILT) zoact_kernels/_C.*.so zoact_kernels/_cuda.so

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'zoact_kernels needs Python 3.10 or newer: make PYTHON=/path/to/python3'; exit 1; }
	$(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo 'No virtual environment: install the venv module of $(PYTHON) (Debian: python3-venv)'; exit 1; }

# The last step builds csrc too, so that a later change of csrc alone does not pass through pip.
$(READY): pyproject.toml .ci/constraints.txt .ci/no-deps.txt | $(BIN)/python
	@echo 'Installing into .venv; a few minutes the first time'
	$(PIP) setuptools pybind11 ninja
	$(PIP) --no-build-isolation -e '.[dev]'
	$(PIP) --no-deps -r .ci/no-deps.txt
	@touch $@

# Where the kernels compiled once, a compile error stops make; it never turns silently into pure Python.
$(BUILT): $(SOURCES) | $(READY)
	ZOACT_BUILD_CPU=$(if $(wildcard zoact_kernels/_C.*.so),1,$(ZOACT_BUILD_CPU)) $(BIN)/python setup.py --quiet build_ext --inplace
