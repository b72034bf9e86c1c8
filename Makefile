# make demo       train a slider on the bundled miniature SDXL and draw its strip (a few minutes on a laptop)
# make test       all tests
# make miniature  train the miniature again from nothing (hours), resumable

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test miniature clean

$(VENV)/run.stamp: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/test.stamp: requirements-test.txt $(VENV)/run.stamp
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

demo: $(VENV)/run.stamp
	$(PY) -m miniature.demo

test: $(VENV)/test.stamp
	$(PY) -m pytest -q tests

miniature: $(VENV)/run.stamp
	$(PY) -m miniature.train

clean:
	rm -rf $(VENV) out
