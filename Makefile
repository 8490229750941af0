# The two commands: `make demo` and `make test`. Each sets up .venv from a bare clone.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
MARKS ?= not slow

.PHONY: demo test lint docs bench corpora clean

demo: .venv/ready
	$(BIN)/gradmend demo

test: .venv/ready
	$(BIN)/pytest --numprocesses=2 --dist=worksteal -m "$(MARKS)" $(PYTEST_ARGS)

lint: .venv/ready
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

# The pages that are made from the code.
docs: .venv/ready
	$(BIN)/python -m gradmend.causes.page > docs/causes.md
	$(BIN)/python -m gradmend.remedies.page > docs/remedies.md

bench: .venv/peers
	$(BIN)/python -m benchmarks $(BENCHMARKS)

# make corpora CASES=path/to/cases.jsonl: what gradmend and its peers find in programs with known faults.
corpora: .venv/corpora
	$(BIN)/python -m benchmarks.corpora --cases $(CASES) $(CORPORA_ARGS)

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

.venv/peers: .venv/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	touch $@

.venv/corpora: .venv/ready benchmarks/corpora/requirements.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -r benchmarks/corpora/requirements.txt
	touch $@

clean:
	rm -rf .venv
