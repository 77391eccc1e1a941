# Two commands for a fresh machine: `make train` runs the embedded demo, `make test` the checks and the tests.
# `make quick` runs the tests that take under a second each, `make test-long` every test, also those of many minutes.
# On a machine with a CUDA GPU, `make gpu DATASET=…` runs the tests that need one and all benchmarks.
PYTHON ?= python3
VENV ?= .venv
INSTALL = $(VENV)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: train test quick test-long lint gpu clean

train: $(VENV)/.installed
	$(VENV)/bin/iisan-fast train

PYTEST = $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal

test: lint
	$(PYTEST) -m 'not long' --slowest 20

quick: $(VENV)/.installed-dev
	$(PYTEST) -m 'not long and not slow'

test-long: $(VENV)/.installed-dev
	$(PYTEST) --slowest 40 --results benchmarks/results/tests.json

# mypy reads the package as it is installed, with kernels/ and cli/ inside: a folder of links looks like that.
lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	rm -rf build/typed
	mkdir -p build/typed/iisan_fast
	ln -s $(CURDIR)/iisan_fast/* $(CURDIR)/kernels $(CURDIR)/cli build/typed/iisan_fast
	ln -s $(CURDIR)/tests/typed_use.py build/typed
	cd build/typed && $(abspath $(VENV))/bin/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/build/mypy \
		typed_use.py $(addprefix iisan_fast/,__init__.py __main__.py api.py config.py settings.py) iisan_fast/*/__init__.py

gpu: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -q -m gpu
	$(VENV)/bin/python -m pytest -q tests/training/test_equality.py -k 'captured or triton'
	$(VENV)/bin/iisan-fast bench kernels $(DATASET) --out benchmarks/results/kernels.json
	$(VENV)/bin/iisan-fast bench train $(DATASET) --out benchmarks/results/train-gpu.json
	$(VENV)/bin/iisan-fast bench evaluate $(DATASET) --out benchmarks/results/evaluate-gpu.json
	$(VENV)/bin/iisan-fast bench growth --out benchmarks/results/growth-gpu.json
	mkdir -p runs
	$(VENV)/bin/iisan-fast bench uncached $(DATASET) --keep runs/gpu --out benchmarks/results/uncached-gpu.json
	$(VENV)/bin/iisan-fast bench extract runs/gpu/dataset --source image --encoder runs/gpu/encoders/image \
		--out benchmarks/results/extract-images-gpu.json
	$(VENV)/bin/iisan-fast bench extract runs/gpu/dataset --source title --encoder runs/gpu/encoders/text \
		--out benchmarks/results/extract-titles-gpu.json
	$(VENV)/bin/iisan-fast bench methods runs/gpu/dataset --folder runs/gpu-methods --epochs 2 --table pinned \
		--image-encoder runs/gpu/encoders/image --text-encoder runs/gpu/encoders/text \
		--out benchmarks/results/methods-gpu.json

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: setup.py constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
