# `make check` is everything CI runs. It uses the environment that README's test command makes.
BIN ?= .venv/bin

.PHONY: check lint types floors test format

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

format:
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
