# Two commands: `make serve` and `make test`. Both install what they need into .venv the first
# time and work without a network from then on. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
# An index with CPU builds of torch, for machines without a GPU. Empty: pip's own configuration.
TORCH_INDEX_URL ?=
# The tests' version of triton. It isn't in constraints.txt, because a torch for CUDA or ROCm requires one version
# itself, which is then kept.
TRITON ?= triton==3.9.0
# Passed on to `trunkline serve`, e.g. make serve ARGS="--port 8000"
ARGS ?=
# Processes among which `make test` divides the files of tests. Each may start servers of half a gigabyte.
WORKERS ?= 2
# Which slow suites `make suites` runs, e.g. SUITES="browser soak". Empty: all of them.
SUITES ?=

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
SERVE_READY := $(VENV)/.ready-serve
TEST_READY := $(VENV)/.ready-test

.DEFAULT_GOAL := help
.PHONY: help serve test check fetch suites full bench format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

serve: $(SERVE_READY) ## Install if need be and serve demo:smollm2-135m-instruct on port 30000 (ARGS="…" for more)
	@exec $(BIN)/trunkline serve $(ARGS)

test: check fetch ## Install if need be; format, lint, types and every test outside the slow suites
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: $(TEST_READY) ## Format, lint and types only
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	cd benchmarks && $(BIN)/mypy --config-file ../pyproject.toml .

fetch: $(SERVE_READY) ## Fetch the demo models into the cache folder
	@$(BIN)/python -m trunkline.core.model.sources.catalogue >/dev/null

suites: $(TEST_READY) fetch ## The slow suites within their budgets (SUITES="browser soak" for some of them)
	$(BIN)/python tests/suites.py $(SUITES) $(ARGS)

full: test ## Every test without limits; writes benchmarks/results/suites-DATE.md, and docs/ from what has run
	$(BIN)/python tests/suites.py --full --write benchmarks/results/suites-$$(date +%F).md
	$(BIN)/python docs/generate.py

bench: $(TEST_READY) fetch ## Measure against transformers and the machine's floor, then the host's overhead
	$(BIN)/python benchmarks/compare.py $(ARGS)
	$(BIN)/python benchmarks/host_overhead.py

format: $(TEST_READY) ## Reformat the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and what tools left behind (not the models)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# setuptools comes first and the build runs without isolation: the pinned one builds, and a
# rebuild after an edit of pyproject.toml needs no network.
$(SERVE_READY): pyproject.toml constraints.txt
	@echo "Installing trunkline into $(VENV) (once; torch is the large part)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "trunkline needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 …" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --quiet setuptools
	@$(PIP) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch
	@$(PIP) --quiet --no-build-isolation --editable .
	@touch $@

$(TEST_READY): $(SERVE_READY)
	@echo "Installing what the tests need into $(VENV) (once)"
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("triton") and sys.platform == "linux")' || \
		$(PIP) --quiet '$(TRITON)'
	@$(PIP) --quiet --no-build-isolation --editable '.[test]'
	@touch $@
