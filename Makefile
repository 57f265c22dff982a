# The two commands of a newcomer are `make demo` and `make test`.
PY := .venv/bin/python
READY := .venv/.ready
# What needs a GPU needs no more than the runner: it uses .venv where there is one, else the python that is there.
GPU_PY := $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)

.PHONY: bench-engine bench-gpu test-gpu help setup servers demo test exactness lint check pages chaos bench-dispatch bench-estimates clean
.DEFAULT_GOAL := help

help: ## say what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv with everything pinned (a second call returns at once)

$(READY): pyproject.toml constraints.txt scripts/setup.sh
	@bash scripts/setup.sh venv
	@touch $@

servers: # redis-server, PostgreSQL and RabbitMQ for the tests, where missing and where we may
	@bash scripts/setup.sh servers

demo: setup ## a job, a fallback, a killed worker and a model beyond memory, before your eyes
	@$(PY) -m scripts.demo

test: setup servers ## run every test, and of the exactness grid a pairwise cover
	$(PY) -m pytest -n 2 --dist loadgroup -m "not serial and not grid"
	$(PY) -m pytest -m serial

exactness: setup ## every family, pass, KV strategy, placement and batch size against plain transformers
	$(PY) -m pytest -n 2 --dist loadgroup -m "" tests/exactness

test-gpu: ## run what needs a CUDA device; asks for torch, transformers, safetensors, accelerate and pytest alone
	@$(GPU_PY) -c "import sys, torch; torch.cuda.is_available() or sys.exit('No CUDA device that torch can use: nothing was tested.')"
	$(GPU_PY) -m pytest -c tests/gpu/pytest.ini tests/gpu

lint: setup ## ruff, mypy --strict and the import contracts
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports

check: lint test ## what CI runs: lint, then test

pages: setup ## write the pages of docs/ that are made from the code
	$(PY) scripts/write_settings_page.py
	$(PY) -m scripts.write_planning_page

chaos: setup servers ## break everything at random for five minutes (CHAOS_SECONDS, CHAOS_SEED)
	CHAOS_SECONDS=$${CHAOS_SECONDS:-300} $(PY) -m pytest tests/chaos -s

bench-dispatch: setup servers ## how fast plans reach workers, and how fast a loss heals
	@$(PY) bench/dispatch.py --json

bench-estimates: setup ## how near the estimates of memory and time are to five models' real attempts
	@$(PY) bench/estimates.py --json

bench-engine: setup ## the engine beside accelerate and transformers, streamed and in memory
	@$(PY) -m bench.engine --json

bench-gpu: ## copies, streaming, a whole job and memory on a CUDA device; asks for no more than test-gpu
	@$(GPU_PY) -m bench.gpu --json

clean: ## remove .venv and every cache
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
