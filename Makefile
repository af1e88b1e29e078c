# make demo: from an empty machine to a trained, measured and exported ResNet-18.
# make test: from an empty machine to a tested checkout.
# make test-fast: the tests between two commits, without those marked as thorough or slow.
# make test-all: all tests, those marked as slow too.
# make web: the page that runs the network in a browser, on 127.0.0.1:8000.
# make notebooks: runs the notebooks and keeps their outputs.
# make docs: the guide and the API as web pages, in build/docs; their search needs a web server.
# All leave `. .venv/bin/activate` usable; run again, they install nothing.

PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
# Python compiles a module when it is first imported: most of TensorFlow's and PyTorch's never are.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile \
	--constraint constraints.txt
# A process for each core; the tests of a file share its fixtures, so they run in one process.
PYTEST = $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

IDX := /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz
TFDS := $(or $(TFDS_DATA_DIR),$(HOME)/tensorflow_datasets)/fashion_mnist

.PHONY: demo web test test-fast test-all notebooks docs data browser lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed data
	$(BIN)/keras-resnet train --recipe quick --run-dir $(DEMO) $(if $(wildcard $(DEMO)/config.json),--resume)
	$(BIN)/keras-resnet evaluate $(DEMO)
	$(BIN)/keras-resnet export $(DEMO)

# The network of `make demo` if it has been run, else the one in the package.
web: $(VENV)/installed data
	$(BIN)/keras-resnet export $(if $(wildcard $(DEMO)/model.keras),$(DEMO),fashion_mnist) --to web --out build/web
	@echo "http://127.0.0.1:8000, until Ctrl-C"
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory build/web 8000

test: lint data browser
	$(PYTEST) -m "not slow"

test-fast: lint data
	$(PYTEST) -m "not slow and not thorough"

# A test at a time goes to the process that is idle: some files hold half an hour of slow tests.
test-all: $(VENV)/installed-test-all lint data browser
	$(PYTEST) --dist worksteal -m ""

notebooks: $(VENV)/installed-test-all data
	$(BIN)/jupyter execute --inplace --NotebookClient.record_timing=False notebooks/*.ipynb

docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build --strict --quiet

# Fashion-MNIST: what is there already, else Debian's package where it may be installed.
data:
	@if [ -e "$(IDX)" ] || [ -e "$(TFDS)" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends \
			dataset-fashion-mnist >/dev/null; } || \
			echo "apt-get failed: TensorFlow Datasets will try to download Fashion-MNIST."; \
	else \
		echo "Fashion-MNIST is not here. Where apt-get works: sudo apt-get install" \
			"dataset-fashion-mnist. Otherwise TensorFlow Datasets will try to download it."; \
	fi

# Chromium and npm, for the tests of the web page: what is there already, else Debian's packages.
browser:
	@missing="$$(command -v chromium >/dev/null || echo chromium) $$(command -v npm >/dev/null || echo npm)"; \
	if [ -z "$$(echo $$missing)" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing >/dev/null; } || \
			echo "apt-get failed: the tests of the web page will be skipped."; \
	else \
		echo "Not here: $$missing. The tests of the web page need both, and will be skipped. Where" \
			"apt-get works: sudo apt-get install chromium npm."; \
	fi

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "keras_resnet needs Python 3.10 or newer: make PYTHON=python3.11 …" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || \
		{ rm -rf $(VENV); [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		  apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null && \
		  $(PYTHON) -m venv $(VENV); } || \
		{ echo "no venv: on Debian and Ubuntu, sudo apt-get install python3-venv" >&2; \
		  rm -rf $(VENV); exit 2; }
	@touch $@

$(VENV)/installed: setup.cfg constraints.txt | $(VENV)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/installed-test: setup.cfg constraints.txt | $(VENV)/python
	$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-docs: setup.cfg constraints.txt | $(VENV)/python
	$(PIP) --editable '.[docs]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-test-all: setup.cfg constraints.txt | $(VENV)/python
	$(PIP) --editable '.[test-all]'
	@touch $@ $(VENV)/installed-test $(VENV)/installed

clean:
	rm -rf $(VENV) build dist *.egg-info
