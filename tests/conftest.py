"""Settings of every test: vLLM in this process, quiet, with threads that share the cores well."""

from __future__ import annotations

import os

import interpreted_v2

if interpreted_v2.is_asked_for():
    interpreted_v2.let_vllm_use_triton()

from sjd_vllm.images.environment import prepare_environment

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # a test run is nobody's usage
prepare_environment(is_quiet=True)
