# The commands of the README. Each makes the environment it needs in .venv first.
# PYTHON, CONSTRAINTS and PIP_FLAGS can be overridden: make test PYTHON=python3.12

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: train test test-full compare tensorboard docs clean

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

train: $(VENV)/installed  ## DQN on CartPole-v1 by its preset, about two minutes
	$(BIN)/python -m scripts.train dqn --env-id CartPole-v1

test: $(VENV)/installed  ## everything a change must pass, under ten minutes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 -q

test-full: $(VENV)/installed  ## the long tests, ten minutes: learning gates, kills, mutations, Ray, docs
	$(BIN)/pytest -n 2 -q -m full

compare: $(VENV)/installed  ## the experiment at its smallest, to its report
	$(BIN)/python -m scripts.compare --tier s
	$(BIN)/python -m scripts.report runs/compare/results

tensorboard: $(VENV)/installed  ## the curves of every run under runs/
	$(BIN)/tensorboard --logdir runs

docs: $(VENV)/installed  ## the API reference, to build/docs/index.html
	$(BIN)/python -m scripts.docs build/docs

clean:
	rm -rf $(VENV) build dist *.egg-info
