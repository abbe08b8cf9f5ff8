# Everything a checkout needs. `make test` and `make demo` set themselves up in $(VENV) on first use.
#
#   PYTHON   interpreter the environment is made with (3.11 or newer)
#   VENV     where it is made
#   EXTRAS   what is installed besides the base; without `parity` (torch, large) the tests that
#            compare with transformers are skipped, and pytest says so

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev,parity
WORKERS ?= 2

comma := ,
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet
# A stamp is newer than pyproject.toml when what that file asks for is installed.
BASE := $(VENV)/.installed-base
DEV := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

# The root holds a folder `sched`, which would shadow the standard library's module.
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint typecheck pytest test-slow format protos protos-check protos-accept clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(BASE) ## serve the shipped demo model and talk to it
	$(BIN)/quire demo

test: lint typecheck pytest ## all that must pass before a change lands

lint: $(DEV) protos-check ## style and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV) ## mend what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy finds a package by its folder's name, and a checkout may be called anything: a link gives it
# the right one. tests/test_typing.py proves that the package is seen through it.
typecheck: $(DEV) ## types
	@mkdir -p .cache/typecheck && ln -sfn "$(CURDIR)" .cache/typecheck/quire
	cd .cache/typecheck && "$(abspath $(BIN))/mypy" --config-file "$(CURDIR)/pyproject.toml" \
	    --cache-dir "$(CURDIR)/.mypy_cache/$(notdir $(VENV))" --exclude '^quire/(tests|build|docs)/' -p quire

pytest: $(DEV) ## the tests alone
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup -m "not slow"

test-slow: $(DEV) ## the tests that take minutes
	$(BIN)/pytest -m slow

protos: $(DEV) ## make the stubs in protos/v1 anew
	$(BIN)/python -P -m quire.tools.protos write

protos-check: $(DEV) ## find stale stubs, and changes to protos/v1 that break clients
	$(BIN)/python -P -m quire.tools.protos check

# Refuses what breaks clients: tools/protos.py says how that is accepted, should it ever be.
protos-accept: $(DEV) ## take what was added to protos/v1 into its golden file
	$(BIN)/python -P -m quire.tools.protos accept

clean: ## remove environments, caches and build outputs
	rm -rf .venv .venv-* .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BASE): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	    echo "make: no '$(PYTHON)' here; install Python 3.11 or newer, or say make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1), Quire needs 3.11 or newer;" \
	         "say make PYTHON=... to choose another" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "make: $(PYTHON) comes without venv or pip;" \
	         "install them (on Debian and Ubuntu: the package python3-venv)" >&2; exit 1; }
	@echo "make: installing into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable .
	@touch $@

$(DEV): $(BASE)
	@echo "make: installing $(EXTRAS) into $(VENV)"
	@$(PIP) --editable ".[$(EXTRAS)]"
	@touch $@
