# The commands of the README. Each makes the environment it needs in .venv first.
# PYTHON, CONSTRAINTS and PIP_FLAGS can be overridden: make test PYTHON=python3.12
# TORCH=cpu takes torch from PyTorch's CPU index, where PyPI would serve the CUDA build.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

ifeq ($(TORCH),cpu)
PIP_FLAGS += --extra-index-url https://download.pytorch.org/whl/cpu
endif
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c $(CONSTRAINTS)

.PHONY: help train test test-full compare tensorboard docs gpu clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' Makefile | expand -t 18

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) 'pip>=25.1'
	$(PIP) -e . --group dev
	touch $@

train: $(VENV)/installed  ## DQN on CartPole-v1 by its preset, about two minutes
	$(BIN)/python -m scripts.train dqn --env-id CartPole-v1

test: $(VENV)/installed  ## everything that a change must pass, under ten minutes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 -q

test-full: $(VENV)/installed  ## the long tests, about ten minutes: learning gates, kills, mutations, Ray, package
	$(BIN)/pytest -n 2 -q -m full

compare: $(VENV)/installed  ## the experiment at its smallest, to its report, a few minutes
	$(BIN)/python -m scripts.compare --tier s
	$(BIN)/python -m scripts.report runs/compare/results

tensorboard: $(VENV)/installed  ## the curves of every run under runs/
	$(BIN)/tensorboard --logdir runs

docs: $(VENV)/installed  ## the pages and the API reference, to build/docs/index.html
	$(BIN)/python -m scripts.docs build/docs

# No environment of its own: PYTHON has torch, numpy, pytest, hypothesis, tensorboard, tyro,
# gymnasium with MuJoCo and stable-baselines3. The options of pyproject.toml ask for more.
gpu:  ## on a machine with a GPU: its tests, five minutes, then its figures, five minutes
	mkdir -p runs/gpu
	-OMP_NUM_THREADS=4 timeout 300 $(PYTHON) -m pytest -q -m cuda -o addopts= -o filterwarnings=default \
		$$(grep -l mark.cuda tests/test_*.py) > runs/gpu/tests.txt 2>&1
	tail -n 40 runs/gpu/tests.txt
	OMP_NUM_THREADS=4 $(PYTHON) -m scripts.bench --device cuda --threads 4 --rounds 7 --minutes 4.5 --out runs/gpu

clean:
	rm -rf $(VENV) build dist *.egg-info
