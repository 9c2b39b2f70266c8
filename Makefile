# Every target does its own set-up and does it once: stamp files in .venv say what is there already.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# What makes a new installation necessary.
INPUTS := pyproject.toml setup.py kernelprovisioner/kernelspecs.py
ARGS   ?=
# Two files at once: service tests mostly wait. More would be in the way of those that count seconds.
BESIDE := -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test unit lint format bench chaos soak clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | sort

run: $(VENV)/.installed-run  ## start the gateway and run a first cell through it
	@$(BIN)/samovar serve --first-cell $(ARGS)

test: lint  ## lint, then all tests, with an own container engine (ARGS="-k word" selects)
	@$(BIN)/python -m tests.services $(BIN)/python -m pytest $(BESIDE) $(ARGS)

unit: $(VENV)/.installed-test  ## the tests that need no service, in under two minutes
	@$(BIN)/python -m pytest tests/unit $(BESIDE) $(ARGS)

lint: $(VENV)/.installed-dev  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-test  ## measure, write benchmarks/results.json and the README's table
	@$(BIN)/python -m tests.services $(BIN)/python -m benchmarks $(ARGS)

chaos: $(VENV)/.installed-test  ## ten minutes of chaos (SAMOVAR_CHAOS_SEED=n repeats a run)
	@SAMOVAR_CHAOS_SECONDS=$${SAMOVAR_CHAOS_SECONDS:-600} $(BIN)/python -m tests.services \
		$(BIN)/python -m pytest -s tests/chaos/test_chaos.py $(ARGS)

soak: $(VENV)/.installed-test  ## 10,000 executions; draws docs/soak.svg
	@$(BIN)/python -m tests.services $(BIN)/python -m tests.chaos.soak docs/soak.svg

clean:  ## remove what the targets above made (installed system packages stay)
	rm -rf $(VENV) .cache build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@echo "[set-up] virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Samovar needs Python 3.11 or newer; $(PYTHON) is older or missing. Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "The virtual environment could not be made; on Debian and Ubuntu: apt-get install python3-venv" >&2; rm -rf $(VENV); exit 1; }

# An installation of more than `run` needs keeps the ones below it.
$(VENV)/.installed-run: $(BIN)/python $(INPUTS)
	@echo "[set-up] packages to run the gateway"
	@$(BIN)/python -m pip install --disable-pip-version-check --no-warn-script-location --progress-bar off -e .
	@$(BIN)/samovar kernelspec install --sys-prefix
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed-run
	@echo "[set-up] packages for the tests"
	@$(BIN)/python -m pip install --disable-pip-version-check --no-warn-script-location --progress-bar off -e '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	@echo "[set-up] packages for development"
	@$(BIN)/python -m pip install --disable-pip-version-check --no-warn-script-location --progress-bar off -e '.[dev]'
	@touch $@
