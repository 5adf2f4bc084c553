# Everything runs in a virtual environment that make builds by itself. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -q -n 2
OLDEST_TORCH = torch==2.11.*

PY = $(VENV)/bin/python
INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-oldest lint format bench bench-cpu bench-training training-matrix gate kernels-offline \
	kernels-offline-oldest report mutants docs fuzz soak sanitize clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 17

venv: $(VENV)/.installed-base ## the package alone, editable, in .venv

demo: $(VENV)/.installed-demo ## sparsify, compile and explain a model
	$(VENV)/bin/padst demo

test: $(VENV)/.installed-test ## the tests
	$(PY) -m pytest $(PYTEST_ARGS)

fuzz: $(VENV)/.installed-test ## nonsense in files and index tensors, many examples, others each time (FUZZ_ARGS='-k index')
	HYPOTHESIS_PROFILE=fuzz $(PY) -m pytest -q tests/test_fuzz.py tests/test_fuzz_saved.py $(FUZZ_ARGS)

soak: $(VENV)/.installed-test ## 10,000 calls and 200 updates of topologies: memory stays flat, nothing is compiled anew
	PADST_SOAK=1 $(PY) -m pytest -q tests/test_soak.py

sanitize: $(VENV)/.installed-test ## the tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	.ci/sanitize $(PY)

test-oldest: ## the tests with the oldest supported torch, in .venv-oldest
	$(MAKE) test VENV=.venv-oldest CONSTRAINT='$(OLDEST_TORCH)' PYTEST_ARGS='$(PYTEST_ARGS)'

lint: $(VENV)/.installed-dev ## formatting, lint rules and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: $(VENV)/.installed-dev ## rewrite what ruff can
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

docs: $(VENV)/.installed-docs ## the documentation, as HTML in site/
	$(PY) -m mkdocs build --strict

bench: bench-cpu bench-training ## all measurements of speed on the CPU; writes into benchmarks/results/
	$(PY) benchmarks/layers.py
	$(PY) benchmarks/models.py
	$(PY) benchmarks/training_layers.py
	$(PY) benchmarks/permute_costs.py
	$(PY) benchmarks/mlp.py
	$(PY) benchmarks/epilogues.py
	$(PY) benchmarks/pass_time.py

kernels-offline: $(VENV)/.installed-base ## compile the Triton kernels for GPUs that are not there (ARGS='--target sm_90 --record')
	TRITON_CACHE_DIR=$(CURDIR)/.cache/triton $(PY) -m padst_compile.kernels.offline --golden tests/golden/offline.json $(ARGS)

kernels-offline-oldest: ## the same with the Triton of the oldest supported torch, in .venv-oldest
	$(MAKE) kernels-offline VENV=.venv-oldest CONSTRAINT='$(OLDEST_TORCH)' ARGS='$(ARGS)'

bench-cpu: $(VENV)/.installed-demo ## layers beside every peer on the CPU; writes into benchmarks/results/
	$(PY) benchmarks/kernels.py --peers onnxruntime deepsparse sparselab

bench-training: $(VENV)/.installed-demo ## training steps, memory and overhead of the runtime; writes into benchmarks/results/
	$(PY) benchmarks/training.py

training-matrix: $(VENV)/.installed-matrix ## train with every structure and permutation (IMAGES=PARQUET TEXT=FILE ARGS='--steps 50 --only gpt/*')
	$(PY) benchmarks/training_matrix.py --out build/training-matrix $(if $(IMAGES),--images $(IMAGES)) $(if $(TEXT),--text $(TEXT)) $(ARGS)

gate: $(VENV)/.installed-base ## whether the results in NEW=folder are slower than the recorded ones
	$(PY) benchmarks/gate.py $(NEW)

report: $(VENV)/.installed-report ## one HTML page of all recorded results, in build/report
	$(PY) benchmarks/evidence.py

mutants: $(VENV)/.installed-test ## mutation testing of the passes (MODULES='permutation.py ...' for some); writes a score
	@$(INSTALL) 'mutmut>=3.8,<4'
	$(PY) benchmarks/mutants.py $(MODULES)

clean: ## remove environments, builds and caches
	rm -rf .venv .venv-oldest build dist site *.egg-info .cache .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per set of extras, older than none of what decides its content: an install is repeated when pyproject.toml
# changes and never otherwise. The stamps depend on the interpreter's existence, not on its age.
EXTRAS_base =
EXTRAS_demo = [timm,transformers]
EXTRAS_docs = [docs]
EXTRAS_matrix = [timm,transformers,train]
EXTRAS_test = [test]
EXTRAS_report = [draw]
EXTRAS_dev = [dev]

$(VENV)/.installed-%: pyproject.toml | $(PY)
	@echo 'installing $* requirements into $(VENV); the first time takes some minutes'
	@$(INSTALL) --editable '.$(EXTRAS_$*)' $(if $(CONSTRAINT),'$(CONSTRAINT)')
	@touch $@

$(PY):
	$(PYTHON) -m venv $(VENV)
