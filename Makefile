# make demo     install into .venv, fetch the small model, run assignment 2, show what came out
# make test     the fast tests;  make test-all   all of them;  make lint   style
# make grade    grade every kernel lab;  make handout   the zip for learners
#
# PYTHON=python3.12 chooses the interpreter of .venv. TORCH_INDEX=URL takes torch from another index first: PyTorch's
# small CPU build is at the URL that the README names.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
REQUIREMENTS := requirements.txt requirements-dev.txt constraints.txt
# A process begins with a half of the tests, so that a file's fixtures are made once, and takes of the other's at its end.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal

.PHONY: demo install test test-all lint format grade handout clean

demo: $(INSTALLED)
	$(BIN)/python -m common.demo

install: $(INSTALLED)

# The stamp is written last: an installation that was cut is done again, a whole one never.
$(INSTALLED): $(REQUIREMENTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install torch -c constraints.txt --index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install -r requirements-dev.txt -c constraints.txt
	touch $(INSTALLED)

test: $(INSTALLED)
	$(PYTEST) -m "not slow"

test-all: $(INSTALLED)
	$(PYTEST)

# Every lab: what is started, right, fast. One lab: python rms_norm/matrix/grade.py
grade: $(INSTALLED)
	$(BIN)/python -m common.grading.all_labs

# A zip for learners: no solutions, no grading tests.
handout: $(INSTALLED)
	$(BIN)/python -m common.grading.handout

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
