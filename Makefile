# The two commands: `make demo` and `make test`. Each sets up .venv from a bare clone.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
MARKS ?= not slow
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)

.PHONY: demo test lint docs pictures bench corpora browser clean

demo: .venv/ready
	$(BIN)/gradmend demo

test: .venv/ready browser
	$(BIN)/pytest --numprocesses=2 --dist=worksteal -m "$(MARKS)" $(PYTEST_ARGS)

lint: .venv/ready
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

# Pages are tested in Debian's Chromium.
browser:
	@command -v chromium > /dev/null || { $(SUDO) apt-get update -qq && \
	$(SUDO) apt-get install -y -qq --no-install-recommends chromium; } || \
	{ echo "Install Chromium by hand: the tests of pages need it." >&2; exit 1; }

# The pages that are made from the code, and the site, in site/.
docs: .venv/ready
	$(BIN)/python -m gradmend.causes.page > docs/causes.md
	$(BIN)/python -m gradmend.remedies.page > docs/remedies.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Screenshots of every page, to be looked at.
pictures: .venv/ready browser
	PYTHONPATH=tests $(BIN)/python docs/pictures.py pictures

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
