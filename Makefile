# make demo    set up, then run the main job on this machine: speech in, a better Whisper out
# make demo-search  set up, then search for good settings with the data of the demo (three minutes)
# make test    set up, then lint, type-check and test
# make test-jobs  set up, then the whole jobs that `make test` has no time for (ten minutes)
# make test-faults  set up, then kill, stop, starve and fill up jobs at every moment (half an hour)
# make test-cluster  set up, then take nodes, networks, heads and stores away from jobs on clusters (a quarter of an hour)
# make image-test  set up, then build the image, look through it, and run a cluster of its containers (a quarter of an hour)
# make bench   the fast engine beside Seq2SeqTrainer with PEFT: all ratios (ten minutes)
# make bench-export  memory and time of the merge beside PEFT's, at whisper-medium's size (10 GB of space; minutes)
# make setup   only the environment

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
# How to get torch; for another build: make demo TORCH="--index-url <index of that build> torch" (see the README).
TORCH ?= "torch>=2.13,<2.14"
BIN := $(VENV)/bin
QUICK := not faults and not jobs and not cluster and not image
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo demo-search demo-data test test-jobs test-faults test-cluster image-test bench bench-export setup lint docs constraints clean
.DELETE_ON_ERROR:

demo: demo-data
	$(BIN)/whisper-jobs run configs/demo.yaml --overwrite

demo-search: demo-data
	$(BIN)/whisper-jobs run configs/search_demo.yaml --overwrite

demo-data: $(VENV)/.demo
	@echo "Making speech and a small Whisper in demo/ ..."
	@$(BIN)/python -m jobs.demo.nano demo/nano-whisper
	@$(BIN)/python -m jobs.demo.make_speech demo/speech
	$(BIN)/whisper-jobs manifest build demo/speech --out demo/manifest --val-ratio 0.25

# First what runs in one process, on two of them; then what starts Ray, which takes both cores as it is.
test: lint
	$(BIN)/python -m pytest --durations=25 -n 2 --dist loadfile -m "$(QUICK)" tests/unit tests/docs tests/numerics
	$(BIN)/python -m pytest --durations=25 -m "$(QUICK)" tests/integration tests/faults tests/browser tests/image

test-jobs: $(VENV)/.test
	$(BIN)/python -m pytest -m jobs

test-faults: $(VENV)/.test
	$(BIN)/python -m pytest tests/faults
	$(BIN)/python -m pytest tests/integration -m faults

test-cluster: $(VENV)/.test
	$(BIN)/python -m pytest -m cluster

# Where torch's CPU build is not what pip finds: make image-test TORCH_INDEX=<PyTorch's CPU index>
image-test: export TORCH_INDEX := $(TORCH_INDEX)
image-test: $(VENV)/.image
	$(BIN)/python -m pytest tests/image

bench: $(VENV)/.test
	PYTHONPATH=. $(BIN)/python tests/benchmarks/bench.py

# Where the disk is slow: make bench-export WORK=/dev/shm
bench-export: $(VENV)/.test
	PYTHONPATH=. $(BIN)/python tests/benchmarks/export_merge.py --write $(if $(WORK),--work $(WORK))

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/.test

docs: $(VENV)/.test
	$(BIN)/python -m service.docs

# After a change of pyproject.toml: install afresh without constraints, then this. Each build of torch wants a triton of
# its own, or none.
constraints: $(VENV)/.test
	{ head -1 constraints.txt; $(BIN)/pip freeze --exclude-editable | sed 's/+cpu//; /^triton==/d'; } > constraints.new
	mv constraints.new constraints.txt

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
		|| { echo "whisper-jobs needs Python 3.11 or 3.12; found: $$($(PYTHON) --version 2>&1). Give one: make demo PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first and by itself: any other package would pull the newest build, gigabytes of CUDA included.
$(VENV)/.torch: $(VENV)/.python constraints.txt
	@echo "Installing packages into $(VENV) (a few minutes the first time) ..."
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[demo]"
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) --editable ".[test]"
	@touch $@

$(VENV)/.image: $(VENV)/.test
	$(PIP) --editable ".[test,image]"
	@touch $@

clean:
	rm -rf demo runs
