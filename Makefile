# Each target sets up what it needs: a virtual environment in .venv with the CPU build of vLLM.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.sjd-vllm-ready
DEMO_OUTPUT := demo-output
BENCH_FLAGS ?= --prompts 16 --concurrency 1,4

.PHONY: demo test check bench clean

demo: $(READY)
	$(BIN)/sjd-vllm demo-prompts 6 --seed 3 | $(BIN)/sjd-vllm generate --prompts-file - -o $(DEMO_OUTPUT) --seed 7
	$(BIN)/sjd-vllm bench --prompts 4 --concurrency 1
	@echo "Pictures and a contact sheet are in $(DEMO_OUTPUT)/"

test: $(READY)
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 PYTHONPATH=$(VENV)/triton $(BIN)/python -m pytest tests/kernels

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	mkdir -p benchmarks/results
	$(BIN)/sjd-vllm bench $(BENCH_FLAGS) --output-row benchmarks/results/latency.csv

clean:
	rm -rf $(VENV) $(DEMO_OUTPUT) build *.egg-info

$(READY): requirements/cpu.lock requirements/kernels.lock requirements/install.sh requirements/vllm_metadata.py setup.py pyproject.toml
	requirements/install.sh $(VENV)
	touch $@
