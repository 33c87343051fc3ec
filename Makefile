# `make check` is everything CI runs. It uses the environment that README's test command makes.
BIN ?= .venv/bin

.PHONY: check lint types layers test format

check: lint types layers test

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

layers:
	$(BIN)/lint-imports

test:
	$(BIN)/python -m pytest

format:
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
