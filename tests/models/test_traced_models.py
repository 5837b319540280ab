"""Model classes of our own under torch.compile: traced as one graph, as vLLM does for CUDA graphs.

Dynamo's own backend runs what was traced, so nothing is compiled to machine code.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_harness import engine
from every_family import MAKERS
from family_harness import engine_prompt, picture_params

from sjd_vllm.models.registry import load_family

PROMPT = "a red house"


@pytest.mark.parametrize("name", ["chameleon", "janus", "llamagen"])
def test_a_traced_model_paints_the_same_picture(tmp_path: Path, name: str) -> None:
    path = MAKERS[name](tmp_path / "checkpoint")
    family = load_family(path)
    assert family is not None
    size = family.sizes[0]
    prompts = [engine_prompt(family, size, PROMPT)]
    params = [picture_params(family, size, PROMPT, temperature=1, seed=5)]
    with engine(path, window=8) as running:
        assert running.runner.model.model.do_not_compile
        expected = running.generate(prompts, params)
    traced = {"mode": 2, "backend": "eager"}  # CompilationMode.DYNAMO_TRACE_ONCE
    with engine(path, window=8, enforce_eager=False, compilation_config=traced) as running:
        assert not running.runner.model.model.do_not_compile
        assert running.generate(prompts, params) == expected
