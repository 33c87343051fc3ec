# `make check` is everything CI runs. It uses the environment that README's test command makes.
BIN ?= .venv/bin

.PHONY: check lint types floors test test-fast format

check: lint types floors test

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

floors:
	$(BIN)/lint-imports

test:
	$(BIN)/python -m pytest

# What needs no kernels: the scheduler, configs, parameters, templates. It imports no Numba.
test-fast:
	$(BIN)/python -m pytest --fast -q

format:
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
