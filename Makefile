# Two commands on a fresh machine (Python 3.11+, g++, make): `make demo` runs the main job, `make test` passes the tests.
# Each does its own set-up in .venv. PYTHON=python3.12 picks an interpreter; PIP_ARGS goes to every pip call (on Linux,
# `--extra-index-url https://download.pytorch.org/whl/cpu` keeps torch's CUDA libraries out).
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
# the CUDA sources take long to compile: only where there is a GPU to run them
export PC_KERNELS_BUILD ?= $(shell nvidia-smi -L > /dev/null 2>&1 && echo auto || echo cpu)
SOURCES := $(shell find csrc -type f 2>/dev/null) setup.py pyproject.toml constraints.txt

.PHONY: demo test lint bench sanitize clean

demo: $(VENV)/.runtime
	$(PY) -m pc_runner demo

test: $(VENV)/.dev lint
	$(PY) -m pytest

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

bench: $(VENV)/.dev
	$(PY) -m benchmarks.run
	$(PY) -m benchmarks.training_step
	$(PY) -m pytest benchmarks/test_ops.py --benchmark-only --benchmark-max-time=0.3 \
	  --benchmark-json=benchmarks/results/cpu_ops.json

# the compiled backend under AddressSanitizer and UndefinedBehaviorSanitizer: ten minutes, so not in CI
sanitize: $(VENV)/.dev
	$(PY) tests/sanitize.py

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "pc-kernels needs Python 3.11 or later: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "missing: apt install python3-venv python3-dev" >&2; exit 1; }
	@command -v g++ > /dev/null || { echo "missing: apt install g++" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first, then the package against exactly that torch: an isolated build would fetch its own
$(VENV)/.torch: $(PY) constraints.txt
	$(PIP) torch 'setuptools>=77' wheel ninja 'pybind11>=2.13'
	@touch $@

$(VENV)/.runtime: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@ $(VENV)/.runtime

clean:
	rm -rf build dist *.egg-info pc_kernels/_C*.so $(VENV)
