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

.PHONY: demo test check test-gpu smoke mutants lint docs dist clean

demo: $(ready)
	$(run) examples/demo.py $(if $(HF_DIR),--hf-dir $(HF_DIR))

test: $(ready) lint
	$(run) -m pytest -m "not gpu" -n $(WORKERS)

# Tests of a few seconds: who imports whom, the faults of `make mutants`, what pages name.
check: $(ready)
	$(run) -m pytest -q tests/test_imports.py tests/test_faults.py tests/test_docs.py \
	  --deselect tests/test_docs.py::test_every_block_of_a_page_runs_as_it_stands

# Run with the Python that has CUDA, Transformer Engine and flash-linear-attention; nothing is installed for it.
test-gpu:
	$(PYTHON) -m pytest -m gpu tests/gpu

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

clean:
	rm -rf .venv build *.egg-info demo-out demo-report.json
