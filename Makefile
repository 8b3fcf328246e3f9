# Two commands on a machine with Python, git and make: `make demo` and `make test`. Each builds .venv as it needs.
PYTHON ?= python3
PRESET ?= quick
MINUTES ?= 10
SEED ?= 0
VENV := .venv
BIN := $(VENV)/bin
# Pinned, so that a build is the same everywhere; on Linux the pinned torch may be a CPU build. Byte code is left to
# the first import, which wants a small part of these packages' files.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

# Unset, whatever it was: without byte code each of the suite's hundreds of processes compiles torch's sources again.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs soak nightly versions clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 10

demo: $(VENV)/.demo  ## train, evaluate and plot a tiny VL-Mamba and ML-Mamba (PRESET=quick or full, SEED=0)
	$(BIN)/vlmamba demo --preset $(PRESET) --seed $(SEED)

test: $(VENV)/.test lint  ## the whole test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not ptx and not nightly"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "ptx and not nightly"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "triton and not nightly"

lint: $(VENV)/.test  ## ruff: rules and format; pyright: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.docs  ## the documentation, as pages in docs/_build/html
	$(BIN)/sphinx-build -W -q -b html docs docs/_build/html

soak: $(VENV)/.test  ## break a small training for MINUTES=10 (SEED=0), and look for anything lost
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --minutes $(MINUTES) --seed $(SEED)

nightly: $(VENV)/.test  ## what takes longer than `test`: random calls on each backend, and the soak
	$(BIN)/ssm-bench fuzz --minutes 10
	TRITON_INTERPRET=1 $(BIN)/ssm-bench fuzz --minutes 10
	$(BIN)/python -m pytest -n 2 --dist worksteal -m nightly
	$(BIN)/ssm-bench compile-report --quick
	$(MAKE) soak
	$(BIN)/ssm-bench emulate --target sm_80 sm_90 --dtype bf16 fp32
	$(BIN)/ssm-bench emulate --target sm_90 sm_100 --tiles published
	$(BIN)/ssm-bench emulate --target sm_100 sm_120

versions: $(VENV)/.test  ## parts of the suite on other versions of Python, torch, Triton, transformers: slow, downloads
	$(BIN)/python tests/versions.py

clean:  ## remove the virtual environment
	rm -rf $(VENV)

$(VENV)/.%: pyproject.toml constraints.txt
	@echo "installing vl-mamba[$*] into $(VENV): some minutes, most of them for torch"
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch numpy
	@$(PIP) --editable .[$*]
	@touch $@
