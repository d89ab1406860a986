# Two commands matter: `make run` (the demo, end to end) and `make test`. Both set everything up first.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export PREFECT_SERVER_ANALYTICS_ENABLED = false
export MLFLOW_DISABLE_TELEMETRY = true
export DO_NOT_TRACK = 1

.PHONY: run test soak check bench bench-gpu up down setup clean

run: $(READY)
	$(BIN)/bessemer run demo

# Two files at a time; `pytest` alone runs one after another.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder

soak: $(READY)
	$(BIN)/python -m pytest -m soak

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(BIN)/vulture
	$(BIN)/pyright

bench: $(READY)
	$(BIN)/python -m benchmarks $(if $(DATA),--data $(DATA))

bench-gpu: $(READY)
	$(BIN)/python -m benchmarks.gpu $(if $(OUT),--out $(OUT))

up: $(READY)
	$(BIN)/bessemer up

down: $(READY)
	$(BIN)/bessemer down

setup: $(READY)

# torch first and alone: DeepSpeed's build imports it, and an open range would pull CUDA packages.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Bessemer needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $(READY)

clean:
	rm -rf .venv build *.egg-info
