# Every target sets up what it needs: only Python >= 3.10, make and git have to be there.
PYTHON ?= python3
BIN := .venv/bin
SEEDS ?= 1

.PHONY: demo test lint bench

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/.installed
	$(BIN)/python train_scripts/demo.py --seeds $(SEEDS)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

bench: .venv/.installed
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/train_step.py speed
	$(BIN)/python benchmarks/train_step.py memory
