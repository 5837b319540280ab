# Each target sets up what it needs: a virtual environment in .venv with the CPU build of vLLM.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.sjd-vllm-ready
DEMO_OUTPUT := demo-output
BENCH_FLAGS ?= --prompts 16 --concurrency 1,4

# What the engine must do on either of vLLM's model runners; V1 runs them with all the others.
V2_TESTS := $(addprefix tests/engine/test_,runners.py requests.py fixed_noise.py greedy.py scheduling.py kv_rollback.py) \
	tests/deploy/test_tensor_parallel.py

REPORT_RUNS := out/report-runs

.PHONY: demo test test-ray check bench report docs next-vllm clean

demo: $(READY)
	$(BIN)/sjd-vllm demo-prompts 6 --seed 3 | $(BIN)/sjd-vllm generate --prompts-file - -o $(DEMO_OUTPUT) --seed 7
	$(BIN)/sjd-vllm bench --prompts 4 --concurrency 1
	@echo "Pictures and a contact sheet are in $(DEMO_OUTPUT)/"

test: $(READY)
	$(BIN)/python -m pytest -m "not cluster"
	TRITON_INTERPRET=1 PYTHONPATH=$(VENV)/triton $(BIN)/python -m pytest tests/kernels
	TRITON_INTERPRET=1 PYTHONPATH=$(VENV)/triton VLLM_USE_V2_MODEL_RUNNER=1 $(BIN)/python -m pytest $(V2_TESTS)

# A real Ray cluster on this machine, its faults included. Its waits are real time, so it wants a machine of its own.
test-ray: $(READY)
	$(BIN)/python -m pytest -m cluster

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	mkdir -p benchmarks/results
	$(BIN)/sjd-vllm bench $(BENCH_FLAGS) --output-row benchmarks/results/latency.csv

# The demo model's report, docs/report.html and .md. Stopped, it goes on where it was; `rm -r out/report-runs` starts anew.
report: $(READY)
	$(BIN)/sjd-vllm eval --suite demo --limit 48 --lossless --num-speculative-tokens 32 \
	    --methods none,gumbel,coupled,reuse,resample -o $(REPORT_RUNS)/main
	$(BIN)/sjd-vllm eval --suite demo --limit 16 --methods gumbel,coupled,reuse,resample --windows 4,8,16,64 \
	    --batch-size 4 -o $(REPORT_RUNS)/windows
	$(BIN)/sjd-vllm report $(REPORT_RUNS)/main $(REPORT_RUNS)/windows -o docs \
	    --load-curve benchmarks/results/load_curve.csv --note "$(REPORT_NOTE)"

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # with --quiet it would not count its warnings

# What the newest vLLM release would change under this package; NEXT_FLAGS="--version 0.33.0" names another.
next-vllm: $(READY)
	$(BIN)/python requirements/next_vllm.py $(NEXT_FLAGS)

clean:
	rm -rf $(VENV) $(DEMO_OUTPUT) build site out *.egg-info

$(READY): requirements/cpu.lock requirements/kernels.lock requirements/install.sh requirements/vllm_metadata.py setup.py pyproject.toml
	requirements/install.sh $(VENV)
	touch $@
