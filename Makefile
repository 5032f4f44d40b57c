# `make demo` and `make test` set up everything they need; a second run starts at once.
.DEFAULT_GOAL := help
VENV := .venv
PY := $(VENV)/bin/python
# The first interpreter that really runs and is new enough (a version manager's shim may exist and still fail).
FIND_PYTHON := for p in $$JAXSERVE_PYTHON python3.12 python3.13 python3.14 python3 python; do \
	  "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 && { echo $$p; break; }; done

.PHONY: help demo test test-all check bench clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

$(VENV)/.runtime: pyproject.toml
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then echo "jaxserve needs Python 3.12 or newer with venv; none was found (set JAXSERVE_PYTHON=/path/to/python)" >&2; exit 1; fi; \
	[ -x $(PY) ] || "$$python" -m venv $(VENV)
	@echo "installing jaxserve into $(VENV)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "installing the development tools into $(VENV)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(VENV)/.runtime  ## Answer several prompts at once with the built-in model
	@$(PY) -m jaxserve generate --model demo --max-tokens 48 --temperature 0 --stop Q: --prompts-file scripts/demo_prompts.jsonl

test: $(VENV)/.dev  ## Run the tests
	@$(PY) -m pytest -n 2 -m "not slow" --ignore tests/test_processes.py
	@$(PY) -m pytest tests/test_processes.py  # starts ten processes of its own

$(VENV)/.eval: $(VENV)/.dev
	@echo "installing the evaluation harness into $(VENV)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev,eval]'
	@touch $@

test-all: $(VENV)/.eval  ## Also those that are slow: kernels that no model uses yet, more interpreted cases, benchmark scripts
	@JAXSERVE_TEST_OPTIMIZED=1 $(PY) -m pytest -n 2

check: $(VENV)/.dev  ## Lint, types, and the import contracts
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/pyright
	@$(VENV)/bin/lint-imports

clean:  ## Remove the environment and every cache
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
