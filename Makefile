# `make demo` trains a small translation model twice and compares; `make test` runs the tests. `make help` lists the rest.
# Needed: make, Python 3.11 or newer. Everything else goes into the folder $(VENV).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# One worker a core (at most eight), one thread each: two workers with two threads each would fight over two cores.
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
JOBS ?= $(shell [ $(CORES) -gt 8 ] && echo 8 || echo $(CORES))
PYTEST_ARGS ?=
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 MPLBACKEND=Agg \
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -q --durations=10 $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help env demo demo-vision docs test test-studies test-compat test-oldest test-transformers test-all lint format audit clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|' 2>/dev/null \
		|| grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST)

env: $(STAMP) ## make the environment (the other commands do so when they need it)

$(STAMP): pyproject.toml tools/make_env.py
	@command -v $(PYTHON) >/dev/null || { echo "error: python: no '$(PYTHON)' found; install Python 3.11 or newer," \
		"or name one: make demo PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) tools/make_env.py $(VENV) demo,test
	@touch $@

demo: $(STAMP) ## train en-de translation from scratch with LNGD, then with AdamW; BLEU, translations, a figure (10 minutes)
	$(BIN)/python scripts/demo.py $(DEMO_ARGS)

demo-vision: $(STAMP) ## train a small ResNet on digits with LNGD, then with AdamW; accuracy, figures (1 minute)
	$(BIN)/python scripts/demo_vision.py $(DEMO_ARGS)

test: $(STAMP) ## the test suite
	$(PYTEST) --ignore=tests/studies --ignore=tests/compat -m "not slow"

test-studies: $(STAMP) ## the tests of benchmarks/
	$(PYTEST) tests/studies

# In an environment of its own: what these packages ask for changes nothing of the suite's. They are named at the end.
test-compat: BIN := $(VENV)/compat/bin
test-compat: $(STAMP) ## the trainers of sentence-transformers and trl, as they are installed now
	$(VENV)/bin/python tools/make_env.py $(VENV)/compat compat,test
	$(PYTEST) tests/compat tests/integration/test_examples.py

# In an environment of its own, with the lower bounds of pyproject.toml. Golden runs begin at weights as later versions of
# transformers draw them.
OLDEST_PYTHON ?= python3.12
test-oldest: BIN := $(VENV)/oldest/bin
test-oldest: ## the test suite with the oldest versions that are supported, on Python 3.12
	$(OLDEST_PYTHON) tools/make_env.py $(VENV)/oldest test oldest
	$(PYTEST) --ignore=tests/studies --ignore=tests/compat --ignore=tests/integration/test_golden.py -m "not slow"

# Each with what it asks for, in a folder before the environment's own.
TRANSFORMERS ?= 5.6 5.10 5.16 5.22
test-transformers: $(STAMP) ## register() and our trainers with other versions of transformers, TRANSFORMERS="5.6 5.10"
	for version in $(TRANSFORMERS); do folder=$(VENV)/transformers/$$version; \
		[ -d $$folder ] || $(BIN)/python -m pip install -q --target $$folder "transformers==$$version.*" || exit 1; \
		PYTHONPATH=$$folder $(PYTEST) $(addprefix tests/integration/test_,stock.py other_trainers.py trainer.py loss.py) \
			|| exit 1; \
	done

test-all: $(STAMP) ## the test suite, its larger grids and the tests of benchmarks/
	$(PYTEST) --ignore=tests/compat

lint: $(STAMP) ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(STAMP) ## let ruff format the code
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# In an environment of its own, so that it changes nothing and is not audited itself. PyPI's service would pass over what
# it does not know, CPU builds of torch among it, and without a network over everything; osv.dev's fails then.
audit: $(STAMP) ## known weaknesses of what is installed, by pip-audit (asks osv.dev)
	$(BIN)/python -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install -q "pip-audit>=2.10,<3"
	PIPAPI_PYTHON_LOCATION=$(abspath $(BIN))/python $(VENV)/audit/bin/python -m pip_audit \
		--vulnerability-service osv --skip-editable

# In an environment of its own, without torch: the API is read from the source. Installed is what the extra `docs` names.
DOCS_STAMP := $(VENV)/docs/.installed

docs: $(DOCS_STAMP) ## the documentation, into site/; warnings, dead links and anchors among them, are errors
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/python -m mkdocs build --strict

$(DOCS_STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
		print(*project['optional-dependencies']['docs'], sep='\n')" > $(VENV)/docs/requirements.txt
	$(VENV)/docs/bin/python -m pip install -q -r $(VENV)/docs/requirements.txt
	@touch $@

clean: ## remove the environment, caches and what the demo wrote
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
