PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-gpu fuzz lint docs format bench bench-gpu bench-quality clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,lint]'
	@touch $@

setup: $(VENV)/.ready ## Create the virtual environment (.venv) with everything in it

demo: setup ## Fill in a masked passage with a real dLLM: eager and mosaic side by side
	$(BIN)/python examples/demo.py

test: setup ## Run the tests (no network, no GPU)
	$(BIN)/python -m pytest -n $(WORKERS)

test-all: setup ## Run the tests and the slow ones, with more examples
	TEST_ALL=1 $(BIN)/python -m pytest -n $(WORKERS) -m 'not gpu'

test-gpu: setup ## Run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

fuzz: setup ## Run 10,000 random programs against eager PyTorch; goes on where it was cut off
	$(BIN)/python -m tests.fuzz --workers $(WORKERS) $(FUZZ)

lint: setup ## Check formatting, lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup ## Build the documentation into build/site, and check its links
	$(BIN)/mkdocs build --strict --quiet --site-dir build/site

format: setup ## Rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-gpu: setup ## Measure steps, peaks, limits, generating and kernels on this machine's GPU
	$(BIN)/python -m benchmarks.gpu $(BENCH)

bench: setup ## Measure the step on this machine's CPU and write benchmarks/results/
	$(BIN)/python -m benchmarks.step_cpu
	$(BIN)/python -m benchmarks.budget_cpu

bench-quality: setup ## Measure what a cache in fewer bits costs, on the shipped models (about an hour)
	$(BIN)/python -m benchmarks.quality

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
