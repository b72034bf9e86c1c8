# make demo       train a slider on the bundled miniature SDXL and draw its strip (a few minutes on a laptop)
# make test       lint and the fast tests: at most 5 minutes on two cores
# make test-slow  the other tests (a quarter of an hour)
# make test-gpu   what is worth testing on a GPU (TEST_DEVICE=mps on a Mac); skips without one
# make lint       ruff (lint and format) and mypy on the core
# make sizes      the size of every module against its budget
# make coverage   all tests once more, with what they leave out of the core
# make test-full  the checks on full-size SDXL with random weights (20 GB of memory and of disk, some minutes)
# make test-oldest  loading, prompts, sampling, sliders, resuming with the oldest supported torch and transformers (a large download)
# make docs-check  run README's commands, the exercises and the notebook; check the options of all other commands (a quarter of an hour)
# make bench      timings and memory against diffusers and peft (an hour or so)
# make experiments  the experiments of the paper (about two hours; what is done is kept)
# make miniature  train the miniature again from nothing (hours), resumable

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2  # two processes of one thread are faster than one of two

.PHONY: demo test test-slow test-gpu lint sizes coverage docs-check test-full test-oldest bench experiments miniature clean

# The versions that the project is tested with: the pins in requirements-test.txt.
$(VENV)/run.stamp: requirements.txt requirements-test.txt
	@echo "setting up $(VENV): PyTorch and a few packages, a minute or more"
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt -c requirements-test.txt
	touch $@

$(VENV)/test.stamp: requirements-test.txt $(VENV)/run.stamp
	$(PIP) -r requirements-test.txt
	touch $@

demo: $(VENV)/run.stamp
	$(PY) -m miniature.demo

test: lint
	$(PYTEST) -m "not slow" tests

test-slow: $(VENV)/test.stamp
	$(PYTEST) -m slow tests

test-gpu: $(VENV)/test.stamp
	TEST_DEVICE=$(or $(TEST_DEVICE),cuda) $(PY) -m pytest -q tests/test_gpu.py

lint: $(VENV)/test.stamp
	$(PY) -m ruff check --quiet .
	$(PY) -m ruff format --quiet --check .
	$(PY) -m mypy

sizes: $(VENV)/run.stamp
	$(PY) -m tests.sizes

coverage: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(PY) -m coverage run -m pytest -q -n 2 tests
	$(PY) -m coverage combine --quiet
	$(PY) -m coverage report

docs-check: $(VENV)/test.stamp
	$(PIP) -r requirements-docs.txt -c requirements-test.txt
	$(PY) tests/docs_check.py

test-full: $(VENV)/test.stamp
	FULL_SIZE=1 $(PY) -m pytest -q -s tests/test_full_size.py

test-oldest: requirements.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/pip install --quiet --disable-pip-version-check -r requirements.txt torch==2.6.0 transformers==4.56.2 pytest==9.2.0
	$(VENV)-oldest/bin/python -m pytest -q tests/test_weights.py tests/test_text.py tests/test_sampler.py tests/test_lora.py tests/test_unfinished.py

bench: $(VENV)/test.stamp
	$(PY) -m bench.many
	$(PY) -m bench.unet
	$(PY) -m bench.unet --size full --dtype bfloat16 --what checkpointing --what memory --rounds 1

experiments: $(VENV)/run.stamp
	$(PY) -m experiments --jobs 2

miniature: $(VENV)/run.stamp
	$(PY) -m miniature.train

clean:
	rm -rf $(VENV) $(VENV)-oldest out
