# preftune: `make test` and `make demo` work alone in a fresh clone with Python >= 3.11 and make.
#
#   make install   .venv with the command `preftune`; a no-op until pyproject.toml or constraints.txt changes
#   make demo      the whole pipeline on a tiny model that the project makes: CPU, offline; ends with a report
#   make test      every test but the long (soak) and the GPU ones
#   make check     linter, types, house rules: under a minute
#   make bench     the speed comparisons in bench/ (on a machine with a CUDA device also: python bench/gpu.py)
#   make soak      the long tests: kills, faults
#   make clean     what the commands above made, .venv and runs/ excepted
#
# Variables:
#   PYTHON=python3.12                                    the interpreter; default: the first that is new enough
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu     where torch comes from; on a public index the default build brings CUDA
#   TORCH=torch==2.12.0                                  another torch; TORCH= (empty) with VENV=--system-site-packages: the machine's own
#   WORKERS=4                                            test processes
#   DEMO=runs/elsewhere                                  where the demo writes; must not exist

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install demo test check bench soak clean

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH ?= $(shell grep '^torch==' constraints.txt)
TORCH_INDEX ?=
VENV ?=
WORKERS ?= 2
DEMO ?= runs/demo
BIN := .venv/bin
STAMP := .venv/.installed

# One thread a process: tiny models run faster on one thread than on two, and two processes share two cores.
QUICK := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

help:
	@sed -n 's/^#   make/  make/p' Makefile

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "preftune needs Python 3.11 or newer; none was found. Give one: make install PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV) .venv
	@# torch first and alone: whatever is installed later finds it there and leaves it.
	$(if $(strip $(TORCH)),$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)))
	grep -v '^torch==' constraints.txt > .venv/constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]' -c .venv/constraints.txt
	@touch $(STAMP)
	@echo "installed: $(BIN)/preftune"

demo: $(STAMP)
	$(BIN)/preftune demo --output $(DEMO)

test: $(STAMP)
	$(QUICK) $(BIN)/python -m pytest -n $(WORKERS) -m "not soak and not gpu"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(QUICK) $(BIN)/python -m pytest tests/test_house.py

soak: $(STAMP)
	$(QUICK) $(BIN)/python -m pytest -m soak

bench: $(STAMP)
	@scripts=$$(ls bench/*.py 2>/dev/null | grep -v bench/gpu.py); \
	if [ -z "$$scripts" ]; then echo "bench/ holds no script yet: nothing was measured"; exit 0; fi; \
	for script in $$scripts; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
