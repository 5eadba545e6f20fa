# Two commands set everything up: `make demo` runs the main job, `make test` proves it. Both use .venv, made once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench lint clean

.venv/.requirements: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.requirements-dev: .venv/.requirements requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: .venv/.requirements
	$(BIN)/python model_script.py --mode demo --config cpu_train_config.json

test: .venv/.requirements-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --cov=model_script --cov=support --cov-report=term --cov-fail-under=92

bench: .venv/.requirements-dev
	$(BIN)/python benchmarks/bench.py $(BENCH)

lint: .venv/.requirements-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv
