# make setup | compare | test | test-explore | test-plain | test-oldest | lint: each builds its environment first if it
# is missing, .venv or, with the oldest versions allowed, .venv-oldest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A pip index that carries CPU builds of torch; on Linux the default index brings the CUDA build. See README.
TORCH_INDEX ?=
CONSTRAINTS ?= constraints.txt
EXTRAS ?= prepare,serve,evaluate,gguf,test,lint
# Of pip, for instance --no-compile.
INSTALL ?=
# Of pytest, for instance --durations=25.
OPTIONS ?=
# Each file to one process, in the order of tests/conftest.py.
FILES := --dist loadfile --no-loadscope-reorder
WORKERS := -n 2 $(FILES)
export OMP_NUM_THREADS ?= 2

.PHONY: setup setup-oldest compare test test-fast test-explore test-plain test-oldest lint bench-model bench-reference \
	bench-inference bench-serve bench-data bench-scale gpu-check null-gpu

setup: $(VENV)/.complete

$(VENV)/.complete: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name it with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch -c $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet $(INSTALL) -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	touch $@

compare: setup
	$(BIN)/python launchers/compare.py --config configs/compare/cpu.yaml

# A third process, for those whose tests wait, for Slurm or for a rank that hangs, leave a core idle.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 $(FILES) $(OPTIONS)

test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -m 'not slow and not slurm' $(OPTIONS)

# Property tests with draws of their own, in place of the fixed ones that CI keeps to; SEED=N draws the same again.
SEED ?=
TESTS ?=
test-explore: setup
	HYPOTHESIS_PROFILE=explore OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -m 'not slow and not slurm' \
		$(if $(SEED),--hypothesis-seed=$(SEED)) $(TESTS)

# The fast suite with all hidden that a CPU has beyond plain instructions. The switch changes attention, packed products
# and what `auto` takes: preparing data multiplies nothing, and training tests name their precision, fp32.
PLAIN := tests/model $(addprefix tests/pretrain/test_,precision.py doctor.py evaluate.py views.py) tests/launchers/test_compare.py
test-plain: setup
	MOR_PLAIN_CPU=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -m 'not slow and not slurm' \
		$(OPTIONS) $(PLAIN)

# The fast suite, and all that holds checkpoints, faults and resumes, with the oldest versions that pyproject.toml allows.
OLDEST ?= .venv-oldest
OLDEST_SETUP := VENV=$(OLDEST) CONSTRAINTS=constraints-oldest.txt EXTRAS=prepare,serve,evaluate,gguf,test
setup-oldest:
	$(MAKE) setup $(OLDEST_SETUP)

test-oldest: setup-oldest
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 3 $(FILES) -m 'not slurm and (not slow or oldest)' $(OPTIONS)

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
