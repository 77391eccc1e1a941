# Two commands for a fresh machine: `make train` runs the embedded demo, `make test` the checks and the tests.
# `make test-gpu-versions` runs the tests that depend on versions with those of the machines with GPUs, on a CPU.
# `make quick` runs the tests that take under a second each, `make test-long` every test, also those of many minutes.
# On a machine with a CUDA GPU, `make gpu DATASET=…` measures the project in eight minutes.
PYTHON ?= python3
VENV ?= .venv
INSTALL = $(VENV)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt
OUT ?= benchmarks/results/gpu
BENCH = $(PYTHON) -m iisan_fast bench

.PHONY: train test quick test-long sanitize test-gpu-versions lint gpu gpu-benchmarks clean

train: $(VENV)/.installed
	$(VENV)/bin/iisan-fast train

PYTEST = $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal
QUICK = $(wildcard tests/test_*.py) $(addprefix tests/,cli data evaluation models ops states training)

test: lint
	$(PYTEST) -m 'not long' --slowest=20

quick: $(VENV)/.installed-dev
	$(PYTEST) -m 'not long and not slow' $(QUICK)

test-long: $(VENV)/.installed-dev
	$(PYTEST) --slowest=40 --results=benchmarks/results/tests.json

# The tests of the C++ with AddressSanitizer and UndefinedBehaviorSanitizer, in about ten minutes.
sanitize: $(VENV)/.installed-dev
	cd tests && $(abspath $(VENV))/bin/python -m helpers.sanitizers

# On a CPU, in an environment of its own: a GPU is not needed to import, to compile ahead of time, or to interpret kernels.
GPU_VERSIONS = .venv-gpu-versions

test-gpu-versions: $(GPU_VERSIONS)/.installed
	$(GPU_VERSIONS)/bin/python -m pytest -q --slowest=20 --results=benchmarks/results/gpu-versions.json \
		tests/test_modules.py tests/ops/test_configurations.py tests/ops/test_operators.py \
		tests/ops/test_dispatch.py tests/ops/test_package.py $(wildcard tests/ops/test_*_interpreted.py) tests/encoders/test_attention.py \
		tests/captioning tests/training/test_training_step_stand_in.py

$(GPU_VERSIONS)/.installed: setup.py constraints-gpu-versions.txt
	$(PYTHON) -m venv $(GPU_VERSIONS)
	$(GPU_VERSIONS)/bin/python -m pip install --disable-pip-version-check -q -c constraints-gpu-versions.txt -e '.[dev]'
	touch $@

# mypy reads the package as it is installed, with kernels/, cli/ and benchmarks/ inside: a folder of links looks like that.
lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	rm -rf build/typed
	mkdir -p build/typed/iisan_fast
	ln -s $(CURDIR)/iisan_fast/* $(CURDIR)/kernels $(CURDIR)/cli $(CURDIR)/benchmarks build/typed/iisan_fast
	ln -s $(CURDIR)/tests/typed_use.py build/typed
	cd build/typed && $(abspath $(VENV))/bin/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/build/mypy \
		typed_use.py $(addprefix iisan_fast/,__init__.py __main__.py api.py setting_fields.py setting_sources.py settings.py settings_files.py) iisan_fast/*/__init__.py

# These two install nothing from a registry: they take the Python that is there, as PYTHON=…, with the machine's torch.
gpu:
	PYTHON=$(PYTHON) benchmarks/on_gpu.sh $(DATASET) $(OUT)

# All GPU tests and benchmarks, for hours; the project has to be installed.
gpu-benchmarks:
	mkdir -p runs $(OUT)
	$(PYTHON) -m pytest -q -m gpu
	$(PYTHON) -m pytest -q tests/training/test_equality.py -k 'captured or gpu'
	$(BENCH) kernels $(DATASET) --out $(OUT)/kernels.json
	$(BENCH) train $(DATASET) --out $(OUT)/train.json
	$(BENCH) evaluate $(DATASET) --out $(OUT)/evaluate.json
	$(BENCH) growth --out $(OUT)/growth.json
	$(BENCH) uncached $(DATASET) --keep runs/gpu --out $(OUT)/uncached.json
	$(BENCH) extract runs/gpu/dataset --source image --encoder runs/gpu/encoders/image --out $(OUT)/extract-images.json
	$(BENCH) extract runs/gpu/dataset --source title --encoder runs/gpu/encoders/text --out $(OUT)/extract-titles.json
	$(BENCH) methods runs/gpu/dataset --folder runs/gpu-methods --epochs 2 --table pinned \
		--image-encoder runs/gpu/encoders/image --text-encoder runs/gpu/encoders/text --out $(OUT)/methods.json

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: setup.py constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(GPU_VERSIONS) build dist *.egg-info
