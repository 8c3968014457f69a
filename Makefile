# Everything runs in .venv, which the first target that needs it builds from requirements.lock.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := .venv/bin/python
# Two threads where nobody says otherwise: the demo and the tests are sized for two cores.
export OMP_NUM_THREADS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast mutants check lock clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: .venv/.ready ## build .venv from requirements.lock

# torch comes first and alone: packages built from source after it find it, and nothing replaces it.
.venv/.ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tessera needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q "$$(grep -m1 '^torch==' requirements.lock)"
	$(PY) -m pip install -q -r requirements.lock
	$(PY) -m pip install -q --no-deps -e .
	touch $@

demo: .venv/.ready ## raw pairs to generated images, two CPU cores, about ten minutes
	$(PY) -m launchers.demo

test: .venv/.ready ## every test, the slow ones and the real components too, on two cores (ARGS=)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup $(ARGS)

test-fast: .venv/.ready ## the tests that need under two minutes together, a file on each core
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow and not real" -n logical --maxprocesses 4 --dist loadfile

mutants: .venv/.ready ## change a token of the core files at a time: do the tests notice? (FILES=, ARGS=; hours)
	$(PY) -m tests.mutants $(FILES) $(ARGS)

check: .venv/.ready ## ruff, mypy, the architecture tests
	$(PY) -m ruff check .
	$(PY) -m ruff format --check --quiet .
	$(PY) -m mypy
	$(PY) -m pytest tests/architecture

lock: ## write requirements.lock again from what .venv holds
	@{ sed -n '/^#/p' requirements.lock; \
	   $(PY) -m pip freeze --exclude-editable | grep -i '^torch==' | sed 's/+.*//'; \
	   $(PY) -m pip freeze --exclude-editable | grep -v -i '^torch=='; } > requirements.lock.new
	@! grep -n '://\|file:\| @ ' requirements.lock.new | grep -v '^[0-9]*:#' || { echo "a requirement has no plain version"; exit 1; }
	mv requirements.lock.new requirements.lock

clean: ## remove caches and runs; .venv stays
	rm -rf runs build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
