# make help lists what can be made. Each target builds the virtual environment .venv when it is
# missing or when its pins changed. PYTHON=/path/to/python uses that interpreter as it is.

ifdef PYTHON
READY :=
else
PINS := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
PYTHON := $(CURDIR)/.venv/bin/python
READY := .venv/ready-$(PINS)
endif

# The interpreter that builds .venv.
BASE_PYTHON ?= python3
# One thread for each process: the tests run in two processes, and small matrices gain nothing from threads.
TEST_PROCESSES ?= 2
# Where train-gpu keeps its run, and how many minutes it may take before it stops with all that was learned.
OUT := runs/tiny
SLICE_MINUTES := 9
# What bench-gpu measures, and where.
BENCH_SIZES := 7b 8b
BENCH_DEVICE := cuda

export PYTHONPATH := $(CURDIR)/src
export PYTHONDONTWRITEBYTECODE := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

LINT_IMPORTS := -c 'from importlinter.cli import lint_imports_command; lint_imports_command(["--no-logo"])'

# Strict: a link, a picture, an anchor or a page of the navigation that leads nowhere is an error. Never with --quiet: warnings
# would not be counted then. The variable silences an announcement of the theme's makers.
BUILD_SITE := NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

.PHONY: help demo gallery docs train-gpu bench-gpu test lint format types imports environment clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     ask the embedded model about two files and a gallery, and mark its answers"
	@echo "make test     lint, types, import contracts, documentation and tests (what CI runs)"
	@echo "make lint     lint, types, import contracts and documentation"
	@echo "make docs     the documentation as a site, in build/site"
	@echo "make gallery  after a training: score the embedded model, and make its card, gallery and cases again"
	@echo "make train-gpu  nine minutes of training the tiny model on a GPU, in the folder OUT=runs/tiny; again: go on"
	@echo "make bench-gpu  nine minutes of all benchmarks at 7B and 8B on a GPU, in the folder OUT=runs/bench; again: go on"
	@echo "make format   rewrite the code in the project's format"
	@echo "make clean    remove .venv and caches"
	@echo
	@echo "PYTHON=/path/to/python make test    uses an interpreter where everything is installed already"

demo: $(READY)
	@$(PYTHON) examples/demo.py

gallery: export OMP_NUM_THREADS := 1
gallery: $(READY)
	@$(PYTHON) -m llava_mini_cli evaluate tiny --write-card --answers runs/answers.jsonl
	@rm -rf examples/gallery
	@$(PYTHON) -m llava_mini_cli data synth examples/gallery --split test --images 8 --clips 3 --questions 2
	@$(PYTHON) examples/draw_gallery.py
	@$(PYTHON) docs/draw_cases.py runs/answers.jsonl

# Not through the console script: torch, transformers, tokenizers, tqdm, numpy, jinja2 and Pillow are all that training
# needs, so make train-gpu PYTHON=python3 OUT=runs/tiny needs no .venv. While there is more to do Python's exit code is 3, like
# that of llava-mini train; make says "Error 3" and ends with 2, as after any error.
train-gpu: $(READY)
	@$(PYTHON) -c 'import sys; from llava_mini.recipes.tiny import train_tiny; \
	  from llava_mini.training.devices import choose_hardware; \
	  sys.exit(0 if train_tiny("$(OUT)", slice_minutes=$(SLICE_MINUTES), hardware=choose_hardware("cuda")) else 3)'

# Needs no .venv either: torch, transformers, numpy and Pillow are enough; what needs PyAV or PEFT is left out without it.
# BENCH_SIZES=tiny BENCH_DEVICE=cpu tries it out.
bench-gpu: OUT := runs/bench
bench-gpu: $(READY)
	@$(PYTHON) -c 'import sys; from llava_mini.benchmarks.sweep import jobs, sweep; \
	  wanted = jobs("$(BENCH_SIZES)".split(), device="$(BENCH_DEVICE)"); \
	  sys.exit(sweep("$(OUT)", wanted, minutes=$(SLICE_MINUTES)).code)'

test: lint
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PYTHON) -m pytest -n $(TEST_PROCESSES) --dist loadfile

lint: $(READY)
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m ruff format --check
	@$(PYTHON) -m pyright --pythonpath $(PYTHON)
	@$(PYTHON) $(LINT_IMPORTS)
	@$(BUILD_SITE)

docs: $(READY)
	@$(BUILD_SITE)
	@echo "The first page is build/site/index.html. With search: $(PYTHON) -m http.server --directory build/site"

format: $(READY)
	@$(PYTHON) -m ruff check --fix --exit-zero
	@$(PYTHON) -m ruff format

environment: $(READY)

# torch goes first, at its pinned version: left free, another package's range would bring the newest and largest build.
.venv/ready-%:
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "llava-mini needs Python 3.11 or newer, $(BASE_PYTHON) is $$($(BASE_PYTHON) --version). Set BASE_PYTHON=/path/to/python3.11." >&2; exit 1; }
	@echo "Building .venv (once; a few minutes)"
	@$(BASE_PYTHON) -m venv .venv
	@rm -f .venv/ready-*
	@.venv/bin/python -m pip install --quiet --quiet --upgrade --constraint constraints.txt pip
	@.venv/bin/python -m pip install --quiet --quiet --constraint constraints.txt torch
	@.venv/bin/python -m pip install --quiet --quiet --constraint constraints.txt --build-constraint constraints.txt --editable '.[train,quantize,peft,data,trl]' --group dev
	@touch $@

clean:
	rm -rf .venv build .pytest_cache .ruff_cache .import_linter_cache
