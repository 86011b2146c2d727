# Two commands: `make demo` and `make test`. Both build their environment in .venv first; `make test-newest` has its own.

PYTHON ?= python3
# Any one build of torch will do; on a machine without a GPU the CPU build is a tenth of the size.
TORCH ?= torch>=2.11,<2.14
BIN := .venv/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
MEGATRON_NEWEST := 0.19.2
NEWEST := .venv-newest/bin

.PHONY: demo test test-newest test-slow lint certificate clean

demo: .venv/installed
	rm -rf runs/demo
	$(BIN)/python -m paralign.tools.demo

# It ends with the seconds of each folder. A change that adds more than 45 s moves something to `slow`.
test: lint
	$(BIN)/python -m pytest

# What megatron-core could break, on the newest one: five minutes, one of them for its environment.
test-newest: .venv-newest/installed
	$(NEWEST)/python -m pytest -m "not certificate" tests/models/test_mcore.py \
	  $(patsubst %,tests/distributed/test_%.py,certificate resume kernels beside_te broken_checkpoints known_warnings)

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
	$(BIN)/python $(PIP_INSTALL) "$(TORCH)"
	$(BIN)/python $(PIP_INSTALL) --editable ".[test]"
	touch $@

# The newest wheel asks for Python 3.12, but runs on 3.11: pip unpacks it as if for 3.12, whatever Python this is.
.venv-newest/installed: pyproject.toml setup.py Makefile
	test -x $(NEWEST)/python || $(PYTHON) -m venv .venv-newest
	$(NEWEST)/python $(PIP_INSTALL) "$(TORCH)"
	$(NEWEST)/python $(PIP_INSTALL) --editable . triton pytest pytest-timeout
	$(NEWEST)/python -m pip uninstall --quiet --yes megatron-core
	$(NEWEST)/python $(PIP_INSTALL) --no-deps --only-binary=:all: --ignore-requires-python --python-version 3.12 \
	  --upgrade --target "$$($(NEWEST)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  megatron-core==$(MEGATRON_NEWEST)
	touch $@

clean:
	rm -rf .venv .venv-newest runs build *.egg-info src/*.egg-info
