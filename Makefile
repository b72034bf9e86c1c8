# make demo       train a slider on the bundled miniature SDXL and draw its strip (a few minutes on a laptop)
# make test       lint and all tests
# make lint       ruff (lint and format) and mypy on the core
# make coverage   all tests once more, with what they leave out of the core
# make test-full  the checks on full-size SDXL with random weights (20 GB of memory and of disk, some minutes)
# make test-oldest  loading, prompts, sampling, sliders, resuming with the oldest supported torch and transformers (a large download)
# make docs-check  run the commands and the exercises that README and docs give (a quarter of an hour)
# make bench      timings and memory against diffusers, peft and the published training loop (an hour or so)
# make experiments  the experiments of the paper (about two hours; what is done is kept)
# make miniature  train the miniature again from nothing (hours), resumable

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test lint coverage docs-check test-full test-oldest bench experiments miniature clean

$(VENV)/run.stamp: requirements.txt
	@echo "setting up $(VENV): PyTorch and a few packages, a minute or more"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/test.stamp: requirements-test.txt $(VENV)/run.stamp
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

demo: $(VENV)/run.stamp
	$(PY) -m miniature.demo

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 tests  # two processes of one thread are faster than one of two

lint: $(VENV)/test.stamp
	$(PY) -m ruff check --quiet .
	$(PY) -m ruff format --quiet --check .
	$(PY) -m mypy

coverage: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(PY) -m coverage run -m pytest -q -n 2 tests
	$(PY) -m coverage combine --quiet
	$(PY) -m coverage report

docs-check: $(VENV)/test.stamp
	$(PY) tests/docs_check.py

test-full: $(VENV)/test.stamp
	FULL_SIZE=1 $(PY) -m pytest -q -s tests/test_full_size.py

test-oldest: requirements.txt
	$(PYTHON) -m venv $(VENV)-oldest
	sed 's/^torch==.*/torch==2.6.0/; s/^transformers==.*/transformers==4.56.2/' requirements.txt > $(VENV)-oldest/requirements.txt
	$(VENV)-oldest/bin/pip install --quiet --disable-pip-version-check -r $(VENV)-oldest/requirements.txt pytest==9.2.0
	$(VENV)-oldest/bin/python -m pytest -q tests/test_weights.py tests/test_text.py tests/test_sampler.py tests/test_lora.py tests/test_unfinished.py

bench: $(VENV)/test.stamp
	$(PY) -m bench.many
	$(PY) -m bench.unet
	$(PY) -m bench.unet --size full --dtype bfloat16 --what checkpointing --what memory --rounds 1
	$(PY) -m bench.recipe --attribute eye_size --attribute age

experiments: $(VENV)/run.stamp
	for name in text_sliders visual_sliders ablations activation guidance composition repair inversion space; do $(PY) -m experiments.$$name || exit 1; done
	$(PY) -m experiments.stylegan.sliders
	$(PY) -m experiments.report

miniature: $(VENV)/run.stamp
	$(PY) -m miniature.train

clean:
	rm -rf $(VENV) $(VENV)-oldest out
