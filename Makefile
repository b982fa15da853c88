# Every target sets up what it needs: only Python >= 3.11, make and git have to be there.
PYTHON ?= python3
BIN := .venv/bin
SEEDS ?= 1
ARMS ?= main
WORKERS ?= logical
MTEB := mteb-$(shell sed -n 's/^mteb==//p' constraints.txt)

.PHONY: demo test test-fast lint docs bench bench-record

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/.installed
	$(BIN)/python -m train_scripts.demo --seeds $(SEEDS) --arms $(ARMS)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation site in build/site; works offline. A broken link, anchor or reference is an error.
docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# One worker per core. `make test-fast` leaves out the tests marked slow or distributed; `make test` runs everything and
# prints the coverage.
# The workers share the cores: more threads would only wait for each other.
test test-fast: export OMP_NUM_THREADS ?= 1
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: lint docs build/$(MTEB)
	$(PYTEST) --cov

# mteb's own tests, which only its source distribution holds. Without a network the test that runs them is skipped.
build/$(MTEB): | .venv/.installed
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary mteb --dest build \
	  $(subst mteb-,mteb==,$(MTEB)) && tar -xzf build/$(MTEB).tar.gz -C build \
	  || echo "no source distribution of mteb: its own tests are skipped"

test-fast: .venv/.installed
	$(PYTEST) -m "not slow and not distributed"

# A quick look, within a quarter of an hour on two cores; benchmarks/results holds the measurements of record.
bench: export BENCH_RESULTS ?= runs/bench
bench: .venv/.installed
	$(BIN)/python benchmarks/encode.py --inputs 18 --repeats 2 --throughput_images 12 --memory_images 500 --texts 10000
	$(BIN)/python benchmarks/mmeb_eval.py --subsets 2 --queries 50 --candidates 50 --documents 100 --images 0 --repeats 1
	$(BIN)/python benchmarks/retrieval.py --queries 1024 --corpus 20000 --repeats 2
	$(BIN)/python benchmarks/judge.py --queries 1 --candidates 20 --repeats 1
	$(BIN)/python benchmarks/rerank.py --queries 2 --repeats 1
	$(BIN)/python benchmarks/train_step.py speed --size small --batch_size 16 --repeats 2
	$(BIN)/python benchmarks/train_step.py memory --batches 64 --stock_batches 64 --repeats 1

# All measurements of record, about an hour on two quiet cores; done results of this commit are kept.
bench-record: .venv/.installed
	$(BIN)/python benchmarks/all.py
	$(BIN)/python benchmarks/all.py --readme
