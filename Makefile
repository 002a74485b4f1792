# The two commands: `make demo` runs the main job on real data with a real model, `make test` checks everything.
# Each makes .venv when it is missing. Other packages sources: make PIP_ARGS="--extra-index-url URL" demo

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_ARGS ?=
RUN_DIR ?= runs/demo
BACKBONE ?= item_vectors
QUICKSTART := configs/quickstart$(if $(filter-out item_vectors,$(BACKBONE)),_$(BACKBONE)).yaml
USER_ID ?= 50
FUZZ_MESSAGES ?= 1000000
WORKERS ?= 3

.DEFAULT_GOAL := help
.PHONY: help demo test check bench docs fuzz wheel-check clean

help: ## List the commands.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("pplr needs Python 3.11 or newer, found " + sys.version.split()[0] + ". Run make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt --editable '.[dev,network,flower,plots,privacy,web,tensorboard,mlflow,docs]'
	@touch $@

demo: $(VENV)/.installed ## Train five clients on MovieLens-100K, the model cut in two; then recommend. BACKBONE=causal_lm or encoder.
	@rm -rf $(RUN_DIR)
	$(BIN)/pplr train $(QUICKSTART) --run-dir $(RUN_DIR)
	$(BIN)/pplr recommend $(RUN_DIR) --user $(USER_ID)

test: check ## The same as check; what .ci/run runs.

check: $(VENV)/.installed ## Lint, types, layers, tests and doctests.
	$(BIN)/ruff check src tests benchmarks docs examples
	$(BIN)/ruff format --check src tests benchmarks docs examples
	$(BIN)/mypy
	$(BIN)/lint-imports
	GOMP_SPINCOUNT=1000 $(BIN)/pytest --quiet --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

bench: $(VENV)/.installed ## Measure speed and memory side by side, and write benchmarks/results.
	$(BIN)/python -m benchmarks

docs: $(VENV)/.installed ## Build the site into build/docs, warnings as errors; open build/docs/index.html.
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

fuzz: $(VENV)/.installed ## Send a million altered messages to a stage server, as a nightly job does.
	PPLR_FUZZ_MESSAGES=$(FUZZ_MESSAGES) $(BIN)/python tests/runtimes/fuzz_codec.py

wheel-check: $(VENV)/.installed ## Do the main job in an empty environment, with the built wheel and with `pip install .`.
	$(BIN)/python -m tests.packaging.wheel_check --pip-args='$(PIP_ARGS)'

clean: ## Remove the environment, the runs and the site.
	rm -rf $(VENV) runs build docs/generated
