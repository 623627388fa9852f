# The commands of a contributor. Each one can be run again at any time; what is up to date is not done twice.
#
#   make quickstart   install, fetch a small model, run a whole study on the CPU and show what it cost
#   make test         everything that CI checks: lint, types and tests
#   make lint         ruff and mypy only
#   make fix          let ruff repair and format
#   make docs         refresh the generated parts of the documentation
#   make hooks        run lint, types and generated documentation before every commit
#   make stress       the long kill campaigns, about an hour
#   make clean        remove the environment, caches and build leftovers; models, runs and studies stay

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/smollm2-135m

# pip learned --group in 25.1.
PIP_VERSION := pip>=25.1

# Without a GPU the pinned CPU build of torch is enough. On many machines the default index serves a CUDA build of several GB
# under the same version number; to get the small one, name an index that has CPU builds, either in pip's own configuration
# (PIP_EXTRA_INDEX_URL, pip.conf) or here: make install TORCH_INDEX=<url>. With a GPU, pip chooses within pyproject's range.
TORCH_INDEX ?=
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)

ifeq ($(GPU),yes)
# Every other pin stays: only torch and what it was built against depend on the driver.
CONSTRAINTS := $(VENV)/constraints.txt
TORCH := torch
else
CONSTRAINTS := constraints.txt
TORCH := torch==2.13.0
endif

.PHONY: install model quickstart test lint fix docs hooks stress clean
.DELETE_ON_ERROR:

install: $(VENV)/.installed

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; name a newer one: make install PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade '$(PIP_VERSION)'
	touch $@

$(VENV)/.installed: $(VENV)/.python pyproject.toml constraints.txt
	sed '/^torch==/d;/^triton==/d;/^nvidia-/d' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c $(CONSTRAINTS) '$(TORCH)'
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[postgres,gguf]' --group dev
	touch $@

# The script does nothing if the folder is complete, so the folder itself needs no stamp.
model: $(MODEL)/config.json

$(MODEL)/config.json: | install
	$(BIN)/python examples/fetch_smollm2.py

quickstart: install model
	@SWEEP=$(BIN)/sweep examples/quickstart.sh

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Tests marked smollm load the real model; without the folder they would have nothing to load. Four at a time on two cores,
# since many wait for processes or for a slice to end; the tests of a file stay together, and the long files come first.
# Each computes on one thread. Those marked alone hold processes to deadlines of seconds.
test: lint model
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not stress and not alone' -n 4 --dist loadfile --no-loadscope-reorder
	$(BIN)/pytest -m 'alone and not stress'

fix: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# cog rewrites the parts between its markers, such as the help texts, from the program itself.
docs: install
	$(BIN)/cog -r README.md docs/*.md

hooks: install
	$(BIN)/pre-commit install

stress: install model
	$(BIN)/pytest -m stress -s --timeout=3600

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
