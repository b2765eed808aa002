# Each target does its whole set-up; only Python (3.11 or later) and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
# Python compiles what is imported; to compile all packages takes a minute or two.
PIP_OPTIONS := --disable-pip-version-check --no-compile
# One process for each core, up to four; each starts the test servers that it needs. A file's tests stay together.
PYTEST := -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile
# The demo needs few packages: an environment of its own, unless the one for development is there.
DEMO_VENV := $(if $(wildcard $(VENV)/installed),$(VENV),$(VENV)/demo)
# As do the unit and contract tests.
QUICK_VENV := $(if $(wildcard $(VENV)/installed),$(VENV),$(VENV)/quick)

.PHONY: demo test quick lint type format docs bench clean

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_OPTIONS) -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/demo/installed: pyproject.toml constraints.txt
	@echo "Installing the demo into $(VENV)/demo: about 6 GB, of which torch and its CUDA libraries take 5. Two to five minutes, once."
	test -x $(VENV)/demo/bin/python || $(PYTHON) -m venv $(VENV)/demo
	$(VENV)/demo/bin/python -m pip install $(PIP_OPTIONS) -c constraints.txt -e '.[demo]'
	touch $@

demo: $(DEMO_VENV)/installed  ## What a cache buys, on embedded real data
	$(DEMO_VENV)/bin/logitcache demo

# A server of a Hugging Face Hub, for tests: its packages don't fit beside ours.
$(VENV)/olah/installed: Makefile
	test -x $(VENV)/olah/bin/python || $(PYTHON) -m venv $(VENV)/olah
	$(VENV)/olah/bin/python -m pip install --quiet $(PIP_OPTIONS) olah==0.5.4
	touch $@

test: $(VENV)/installed $(VENV)/olah/installed  ## Everything that CI tests
	$(BIN)/python $(PYTEST)

$(VENV)/quick/installed: pyproject.toml $(CONSTRAINTS)
	@echo "Installing the test-core extra into $(VENV)/quick: about 6 GB, of which torch and its CUDA libraries take 5. Two to five minutes, once."
	test -x $(VENV)/quick/bin/python || $(PYTHON) -m venv $(VENV)/quick
	$(VENV)/quick/bin/python -m pip install $(PIP_OPTIONS) -c $(CONSTRAINTS) -e '.[test-core]'
	touch $@

quick: $(QUICK_VENV)/installed  ## Unit and contract tests: no servers, no processes that are killed
	$(QUICK_VENV)/bin/python $(PYTEST) tests/unit tests/contract

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/installed
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed  ## The documentation site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(VENV)/installed  ## Measure on this machine, into benchmarks/results/; trust.py needs a commit to compare with
	$(BIN)/python benchmarks/stage1.py --write
	$(BIN)/python benchmarks/engines.py --write
	$(BIN)/python benchmarks/stage2.py --write
	$(BIN)/python benchmarks/tokens.py --write
	$(BIN)/python benchmarks/share.py --write
	$(BIN)/python benchmarks/together.py --write

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
