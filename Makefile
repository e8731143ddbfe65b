# make quickstart   text, tokenizer, data, training, resume: the whole way, in minutes, on two cores
# make test         the tests, with each layout tried on some systems and each system under some layouts
# make test-all     the whole matrix of systems and layouts besides
# make lint         ruff and mypy
# make clean        remove what these made, except the virtual environment; `make distclean` removes that too

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The first that runs, so that a version manager's empty shim is passed over. `make PYTHON=...` chooses another.
PYTHON ?= $(firstword $(foreach name,python3.12 python3,$(if $(shell $(name) -c 'print(1)' 2>/dev/null),$(name))))
PYTHON_VERSION = $(shell $(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null)
IS_NEW_ENOUGH = $(shell $(PYTHON) -c 'import sys; print("yes" if sys.version_info >= (3, 12) else "")' 2>/dev/null)
TOO_OLD = MoRE needs Python 3.12 or newer, $(or $(PYTHON),python3) is $(or $(PYTHON_VERSION),not there): \
install Python 3.12, or name it with `make PYTHON=/path/to/python3.12`

.PHONY: quickstart test test-all lint clean distclean

quickstart: $(STAMP)
	@$(BIN)/python tools/quickstart.py

# Three workers for two cores: there is work while one waits for its turn to start several ranks, or for a process.
PYTEST = $(BIN)/python -m pytest --numprocesses 3 --dist loadfile

test: $(STAMP)
	$(PYTEST)

test-all: $(STAMP)
	$(PYTEST) --all

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf quickstart wandb .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

$(STAMP): pyproject.toml
	$(if $(IS_NEW_ENOUGH),,$(error $(TOO_OLD)))
	@echo "Installing into $(VENV) ($(PYTHON) $(PYTHON_VERSION)); the first time this takes minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
