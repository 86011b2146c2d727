# Two commands: `make demo` and `make test`. Both build their environment in .venv first.

PYTHON ?= python3
# Any one build of torch will do; on a machine without a GPU the CPU build is a tenth of the size.
TORCH ?= torch>=2.11,<2.14
BIN := .venv/bin

.PHONY: demo test test-slow lint certificate clean

demo: .venv/installed
	rm -rf runs/demo
	$(BIN)/python -m paralign.tools.demo

# It ends with the seconds of each folder. A change that adds more than 45 s moves something to `slow`.
test: lint
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Faults, signals, torchrun's restarts, a real SLURM where it is installed, runs of an older commit, what eight ranks
# repeat: half an hour.
test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

# The full product of the certificates, every fault, ten kills of the campaign: the better part of an hour.
certificate: .venv/installed
	$(BIN)/python -m pytest tests/distributed -m "certificate or slow or not slow"

# torch comes first and alone, so that nothing that depends on it chooses another build.
.venv/installed: pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

clean:
	rm -rf .venv runs build *.egg-info src/*.egg-info
