# Everything runs in .venv, built through constraints.txt on first use.

PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/deepflow-digits
export OMP_NUM_THREADS ?= 1

.PHONY: train test test-slow lint format clean

train: .venv ## train a small DeepFlow on handwritten digits, draw samples, measure them
	$(BIN)/python train.py configs/deepflow-digits.yaml train.folder=$(RUN) $(OPTIONS) --resume auto
	$(BIN)/python sample.py $(RUN) solver.name=heun solver.steps=25 guidance.0.scale=1 \
		sample.count=1000 sample.output=$(RUN)/heun-25.npz
	$(BIN)/python sample.py $(RUN) solver.name=euler solver.steps=20 guidance.0.scale=1.5 \
		sample.count=1000 sample.output=$(RUN)/euler-20-guided.npz
	$(BIN)/python evaluate.py $(RUN)/heun-25.npz $(RUN)/euler-20-guided.npz

test: .venv ## all tests not marked slow, file by file on two processes
	$(BIN)/pytest --numprocesses=2 --dist=loadfile

test-slow: .venv ## the tests marked slow, and property tests on 1,000 examples each
	HYPOTHESIS_EXAMPLES=1000 $(BIN)/pytest -m "slow or property"

lint: .venv ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv ## apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pathline needs Python 3.11 or later")'
	@trap 'rm -rf .venv pathline.egg-info build' EXIT; trap 'exit 1' INT TERM; set -ex; \
	$(PYTHON) -m venv .venv; \
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip; \
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'; \
	rm -rf pathline.egg-info build; : left by setuptools, would shadow the installed metadata; \
	mkdir -p .typing; ln -sfn .. .typing/pathline; \
	touch .venv; trap - EXIT

clean: ## remove what was built; runs stay
	rm -rf .venv .typing build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
