# Each target sets up its own .venv; only Python 3.11+, make and a package index are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test test-all check bench peers clean

demo: $(VENV)/.installed  ## convert an embedded tiny Ling model to FP8 and back, prove it, show the result
	$(BIN)/python -m lingconv.cli.demo

test: $(VENV)/.installed-dev  ## run the tests, in two processes: some minutes
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not long"

test-all: test  ## ... and then those that take long by their nature: a hundred kills of each kind
	$(BIN)/python -m pytest -q -n 2 -m long

check: $(VENV)/.installed-dev  ## lint, format, types, and what the wheel holds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	rm -rf dist
	HATCH_BUILD_NO_HOOKS=true $(BIN)/python -m build --outdir dist . > dist.log 2>&1 || { cat dist.log; exit 1; }
	rm -f dist.log
	$(BIN)/check-wheel-contents dist/*.whl

bench: $(VENV)/.installed-dev  ## measure side by side with cp; needs about 45 GB of disk and 40 minutes; LLAMA_CPP names a checkout that is built
	$(BIN)/python -m benchmarks.conveyor
	$(BIN)/python -m benchmarks.disk
	$(BIN)/python -m benchmarks.proof
	$(BIN)/python -m benchmarks.gguf $(if $(LLAMA_CPP),--llama-quantize $(LLAMA_CPP)/build/bin/llama-quantize)
	$(BIN)/python -m benchmarks.megatron
	$(BIN)/python -m benchmarks.merge
	$(BIN)/python -m benchmarks.hub
	$(BIN)/python -m benchmarks.estimate
	$(BIN)/python -m benchmarks.peers $(if $(LLAMA_CPP),--llama-cpp $(LLAMA_CPP))
	$(BIN)/python -m benchmarks.cuda --work /dev/shm/lingconv-bench

peers:  ## environments with what else does these jobs, for `make bench` to run beside
	$(PYTHON) -m venv .peers/llm-compressor
	.peers/llm-compressor/bin/python -m pip install -q -c constraints.txt llmcompressor
	$(PYTHON) -m venv .peers/mergekit
	.peers/mergekit/bin/python -m pip install -q mergekit

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e '.[report]'
	touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) dist demo-out .bench .peers
