# Two commands do everything, each making .venv by itself: `make demo` and `make test`. `make help` lists the others.
PYTHON ?= python3
# URL of an index with CPU builds of torch, for CPU users whose default index would bring CUDA: make setup TORCH_INDEX=https://...
TORCH_INDEX ?=
BIN := .venv/bin
STAMP := .venv/.installed
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
# Several cores are worth more to concurrent processes than to one tiny network.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-shadow demo-scene demo-layout demo-vpog test test-slow test-gpu lint clean

help:  ## list the commands
	@sed -n 's/^\([a-z-]*\):.*##\(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP)  ## create .venv with everything the demo and the tests need

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	@touch $@

demo: $(STAMP)  ## train on real handwriting, with and without shortcuts, and write outputs/demo/report.html (6 min)
	$(BIN)/python -m demos.shortcut

demo-shadow: $(STAMP)  ## render shadows, learn to cast them in one step, write outputs/demo-shadow/report.html (15 min)
	$(BIN)/python -m demos.shadow

demo-scene: $(STAMP)  ## generate whole 3D scenes, with and without a view of one another, write outputs/demo-scene/report.html (15 min)
	$(BIN)/python -m demos.scene

demo-layout: $(STAMP)  ## put objects into boxes and keep their identity, in three stages, write outputs/demo-layout/report.html (20 min)
	$(BIN)/python -m demos.layout

demo-vpog: $(STAMP)  ## find poses of unseen objects by templates of their meshes, write outputs/demo-vpog/report.html (15 min)
	$(BIN)/python -m demos.vpog

test: $(STAMP)  ## lint and the fast tests (CPU)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-slow: $(STAMP)  ## the long tests: fault campaign, demo report in a browser
	$(BIN)/python -m pytest -m slow

test-gpu: $(STAMP)  ## tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

lint: $(STAMP)  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## remove .venv and outputs
	rm -rf .venv outputs
