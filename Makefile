# `make demo` and `make test` set up everything they need in .venv; the first run installs, later ones work offline.
PYTHON ?= python3
# Pinned, so that a tested build is used. On Linux, PyPI's wheel brings CUDA libraries; a smaller CPU build comes with
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint clean

$(VENV)/.installed: pyproject.toml setup.cfg
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hf-littlebit needs Python 3.11 or later; run: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet $(TORCH)
	$(RUN) -m pip install --quiet --editable '.[dev,optimum]'
	touch $@

demo: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(RUN) examples/demo.py --out demo-output

# One thread: on few or shared cores, threads that wait for each other cost more than they bring.
test: $(VENV)/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) demo-output build dist *.egg-info src/*.egg-info
