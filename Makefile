# `make check`, and `make fuzz`, are everything CI runs. They use the environment that README's test command makes.
BIN ?= .venv/bin

# A minute of each fuzzer, two at a time. The seed is fixed: a change must not fail by what it has not touched.
FUZZ ?= loaders templates bodies grammars
FUZZ_SECONDS ?= 60
FUZZ_SEED ?= 0

.PHONY: check lint types layers test test-fast fuzz format $(FUZZ)

check: lint types layers test

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Also as other systems' Python has its library: what is not there has to be asked for.
types:
	$(BIN)/mypy
	$(BIN)/mypy --platform darwin --cache-dir .mypy_cache/darwin
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32

layers:
	$(BIN)/lint-imports

test:
	$(BIN)/python -m pytest

# What needs no kernels: the scheduler, configs, parameters, templates. It imports no Numba.
test-fast:
	$(BIN)/python -m pytest --fast -q -n 2

fuzz:
	$(MAKE) --no-print-directory -j 2 --output-sync=target $(FUZZ)

$(FUZZ):
	$(BIN)/python scripts/fuzz/$@.py --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED)

format:
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
