# Every target sets up .venv by itself. Needs Python 3.11 or 3.12, make and a package index; no GPU, no hub.
.DEFAULT_GOAL := help
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(shell command -v $(p) 2>/dev/null)))
BIN := .venv/bin
STAMP := .venv/.installed
DATA_ROOT ?=
OUT ?= runs/nano
PORT ?=
DATA_FLAG := $(if $(DATA_ROOT),--data-root $(DATA_ROOT))
PORT_FLAG := $(if $(PORT),--port $(PORT))

.PHONY: help setup quickstart test test-slow test-browser lint demo serve bench reproduce-nano clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml $(wildcard packages/*/pyproject.toml)
	@test -n "$(PYTHON)" || { echo "error: no python3 found; install Python 3.11 or 3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else "error: found Python %d.%d; install Python 3.11 or 3.12, or say make PYTHON=/path/to/python3.11" % v)'
	@echo "Setting up .venv (once; downloads a few GB of wheels where they are not cached)"
	@$(PYTHON) -m venv .venv || { echo "error: $(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -e packages/core_llm -e packages/vision_adapter -e "packages/speech_adapter[espeak]" -e packages/guard -e ".[dev]"
	@touch $@

setup: $(STAMP) ## Set up .venv

quickstart: $(STAMP) ## Measure the bundled nano family and write the report (2 minutes)
	@$(BIN)/evals quickstart

test: $(STAMP) ## Run the tests (10 minutes at most on 2 cores)
	@$(BIN)/python -m pytest

test-slow: $(STAMP) ## Run the slow tests
	@$(BIN)/python -m pytest -m slow

test-browser: $(STAMP) ## Run the demo's tests in headless Chromium (needs chromium and its driver)
	@$(BIN)/python -m pytest -m browser

lint: $(STAMP) ## Run ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

demo: $(STAMP) ## Open the demo in the browser
	@$(BIN)/demo $(PORT_FLAG)

serve: $(STAMP) ## Serve the moderation API
	@$(BIN)/guard serve $(PORT_FLAG)

bench: $(STAMP) ## Measure generation on this CPU against other engines (benchmarks/results; 10 GB of disk)
	@$(BIN)/python benchmarks/generate.py

reproduce-nano: $(STAMP) ## Train the nano family from scratch (DATA_ROOT=... reads local datasets)
	@$(BIN)/evals reproduce-nano $(DATA_FLAG) --out $(OUT)

clean: ## Remove .venv and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
