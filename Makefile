# `make demo` and `make test` set everything up in .venv. Later calls check this in a fraction of a second.
# VENV=dir             use another environment than .venv
# PYTHON=python        the interpreter that creates it (3.10 or later, with pip)
# DETECTRON2=upstream  build detectron2 from its own repository (needs GitHub and a compiler)

VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow lint docs setup clean

demo: setup
	$(RUN) tools/demo.py

# Two processes, each of which runs whole files: their tests share what is slow to make.
test: setup
	$(RUN) -m pytest -n 2 --dist loadfile

test-slow: setup
	$(RUN) -m pytest -m slow || [ $$? -eq 5 ] # 5: no slow tests

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

docs: setup
	$(RUN) docs/build.py

setup:
	@$(PYTHON) scripts/install.py --venv "$(VENV)"

clean:
	rm -rf build dist output/demo *.egg-info projects/*/*.egg-info
