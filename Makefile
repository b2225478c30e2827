# make setup | compare | test | test-explore | lint: each builds the environment in .venv first if it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A pip index that carries CPU builds of torch; on Linux the default index brings the CUDA build. See README.
TORCH_INDEX ?=
export OMP_NUM_THREADS ?= 2

.PHONY: setup compare test test-fast test-explore lint bench-model bench-reference bench-inference bench-serve \
	bench-data bench-scale gpu-check null-gpu

setup: $(VENV)/.complete

$(VENV)/.complete: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name it with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[prepare,serve,evaluate,gguf,test,lint]'
	touch $@

compare: setup
	$(BIN)/python launchers/compare.py --config configs/compare/cpu.yaml

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not slurm'

# Property tests with draws of their own, in place of the fixed ones that CI keeps to; SEED=N draws the same again.
SEED ?=
TESTS ?=
test-explore: setup
	HYPOTHESIS_PROFILE=explore OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not slurm' \
		$(if $(SEED),--hypothesis-seed=$(SEED)) $(TESTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-model: setup
	$(BIN)/python tests/benchmarks/bench_model.py

# REFERENCE: a checkout of the authors' repository; REFERENCE_PYTHON: the Python of an environment that runs it.
bench-reference: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_model.py --clock cpu \
		--reference $(REFERENCE) --reference-python $(REFERENCE_PYTHON)

bench-inference: setup
	$(BIN)/python tests/benchmarks/bench_inference.py

bench-serve: setup
	$(BIN)/python -m tests.benchmarks.bench_serve

bench-data: setup
	$(BIN)/python tests/benchmarks/bench_tokenize.py
	$(BIN)/python tests/benchmarks/bench_corpus.py
	$(BIN)/python tests/benchmarks/bench_loader.py

# On a machine with a GPU: is it right, how fast is it? Under ten minutes; results in GPU_OUT.
GPU_OUT ?= runs/gpu-check
gpu-check: setup
	$(BIN)/python -m tests.gpu.check --out $(GPU_OUT)

# Without a GPU: the host's side on a CUDA device that computes nothing. VENV must hold a CUDA build of torch.
null-gpu: setup
	$(BIN)/python -m tests.gpu.null.build build/null-gpu
	NULL_DEVICE=build/null-gpu $(BIN)/python -m pytest -n 0 tests/gpu/null

bench-scale: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_checkpoint.py
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.bench_step
