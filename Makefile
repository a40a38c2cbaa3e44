# Two commands do everything on a fresh machine: `make demo` and `make test`.
# `make help` lists the others.

PYTHON ?= python3
BIN := .venv/bin
PROTO_BIN := .venv-proto/bin
ORACLE_BIN := .venv-oracle/bin

PROCESSES ?= 2

# Small matrices gain nothing from a second thread, and lose much where other programs share the cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help

.PHONY: help
help:  ## show what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

.PHONY: demo
demo: .venv/.installed  ## all three stages: a base, a reward model, and two policies trained at once
	$(BIN)/python examples/sentiment/demo.py

.PHONY: algorithms
algorithms: .venv/.installed  ## PPO, GRPO, RLOO and REINFORCE++ on the example, into docs/algorithms.json and .md
	$(BIN)/python examples/sentiment/algorithms.py

.PHONY: test
test: check  ## everything: formatting, lint, types, import contracts, drift of what is generated, and all tests

.PHONY: check
check: format-check lint types imports proto-check aio-check pytest  ## the same, for people who are used to this name

.PHONY: install
install: .venv/.installed  ## make the environment in .venv

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: format
format: .venv/.installed  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: format-check
format-check: .venv/.installed
	$(BIN)/ruff format --check .

.PHONY: lint
lint: .venv/.installed  ## ruff
	$(BIN)/ruff check .

.PHONY: types
types: .venv/.installed  ## mypy --strict
	$(BIN)/mypy

.PHONY: imports
imports: .venv/.installed  ## who may import whom
	$(BIN)/lint-imports

.PHONY: pytest
pytest: .venv/.installed  ## the tests alone, in two processes (make pytest PROCESSES=4 for more)
	$(BIN)/pytest -n $(PROCESSES) --dist loadfile

.venv-proto/.installed: proto/requirements.txt
	test -x $(PROTO_BIN)/python || $(PYTHON) -m venv .venv-proto
	$(PROTO_BIN)/python -m pip install --quiet -r proto/requirements.txt
	touch $@

PROTOC = PATH=$(CURDIR)/$(PROTO_BIN):$$PATH $(PROTO_BIN)/python -m grpc_tools.protoc -Iproto \
	--python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) proto/onebase/v1/*.proto

.PHONY: proto
proto: .venv-proto/.installed  ## generate the stubs from the .proto files
	$(call PROTOC,proto)

.PHONY: proto-check
proto-check: .venv-proto/.installed  ## fail if the stubs are not what the .proto files say
	rm -rf .cache/proto && mkdir -p .cache/proto
	$(call PROTOC,.cache/proto)
	@for file in .cache/proto/onebase/v1/*; do cmp $$file proto/onebase/v1/$$(basename $$file) \
		|| { echo "the stubs are stale: run 'make proto' and commit them"; exit 1; }; done

.PHONY: aio
aio: .venv/.installed  ## make the asyncio client from the sync one
	$(BIN)/python tools/make_aio.py

.PHONY: aio-check
aio-check: .venv/.installed  ## fail if the asyncio client is not what the sync one says
	$(BIN)/python tools/make_aio.py --check

.PHONY: api
api: .venv/.installed  ## list the public API anew, after a change that is meant
	$(BIN)/python tools/public_api.py

.venv-oracle/.installed: tests/oracle/requirements.txt
	test -x $(ORACLE_BIN)/python || $(PYTHON) -m venv .venv-oracle
	$(ORACLE_BIN)/python -m pip install --quiet -r tests/oracle/requirements.txt
	touch $@

.PHONY: oracle
oracle: .venv-oracle/.installed .venv/.installed  ## remake the fixtures with TRL 0.11.4, today's TRL, and PEFT
	$(ORACLE_BIN)/python tests/oracle/generate.py
	$(BIN)/python tests/oracle/generate_trainers.py

.PHONY: matrix
matrix: .venv/.installed  ## every architecture against transformers and PEFT, into docs/architectures.md
	PYTHONPATH=tests $(BIN)/python -m matrix.run

.PHONY: faults
faults: .venv/.installed  ## every fault for real, a random history and the fuzzers, into docs/reliability.md (25 minutes)
	PYTHONPATH=tests $(BIN)/python -m faults.run

.PHONY: history
history: .venv/.installed  ## random operations and 200 kills of the server, checked against a model and a replay (SEED=, KILLS=)
	PYTHONPATH=tests $(BIN)/python -m history.run --kills $(or $(KILLS),200) $(if $(SEED),--seed $(SEED))

.PHONY: soak
soak: .venv/.installed  ## half an hour of trainers that come and go; fails if anything grows (SOAK_MINUTES=)
	PYTHONPATH=tests $(BIN)/python -m soak.run --minutes $(or $(SOAK_MINUTES),30)

.PHONY: bench
bench: .venv/.installed  ## ratios against transformers and PEFT, into benchmarks/results/; alone on the machine, please
	$(BIN)/python benchmarks/run.py

.PHONY: bench-peers
bench-peers: .venv/.installed .venv-oracle/.installed  ## PPO beside TRL 0.11.4 on the same work
	$(BIN)/python benchmarks/run.py --only ppo_ --only memory_

.PHONY: load
load: .venv/.installed  ## 64 clients for 10 minutes, then a flood, into benchmarks/results/load.json (LOAD_MINUTES=)
	$(BIN)/python benchmarks/load.py

FUZZ_INPUTS ?= 100000
FUZZ_SEED ?= 0

.PHONY: fuzz
fuzz: .venv/.installed  ## malformed calls, files and connections, 12 minutes, into .cache/fuzz.json (FUZZ_INPUTS=, FUZZ_SEED=)
	PYTHONPATH=tests $(BIN)/python -m fuzz.run --inputs $(FUZZ_INPUTS) --seed $(FUZZ_SEED) --out .cache/fuzz.json

.PHONY: wheel
wheel: .venv/.installed  ## build the wheel into dist/
	$(BIN)/python -m build --no-isolation --wheel

.PHONY: clean
clean:  ## remove everything that was made, environments included
	rm -rf .venv .venv-proto .venv-oracle .demo .cache dist runs
