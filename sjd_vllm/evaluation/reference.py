"""The model's own distributions of finished tokens: teacher forcing through vLLM as installed.

One forward over prompt and picture, by an engine without drafts, windows, pairs or fixed noise. It shares nothing with
the decoding under test but the model, so that it serves every model that vLLM does.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sjd_vllm.core import process_target
from sjd_vllm.images.environment import prepare_environment
from sjd_vllm.images.request import PictureRequest
from sjd_vllm.models.family import ImageFamily

_ROWS = 1024  # positions processed at once, which bounds the memory of large vocabularies
_HIDDEN = "_sjd_vllm_hidden_states"
_KV_BLOCKS_TO_SPARE = 3
_KV_BLOCK_SIZE = 128  # tokens in a KV block of vLLM's CPU build


class Reference:
    """An engine that scores finished pictures.

    Args:
        family: of the checkpoint.
        max_model_len: tokens of the longest sequence.
        engine_args: anything else that `vllm.EngineArgs` takes; as in the run that made the pictures.
    """

    def __init__(self, family: ImageFamily, max_model_len: int, engine_args: dict[str, Any] | None = None) -> None:
        prepare_environment()
        from vllm import LLM
        from vllm.platforms import current_platform

        from sjd_vllm.plugin import register

        register()  # the model classes of our families
        settings: dict[str, Any] = {
            "max_model_len": max_model_len,
            "max_num_batched_tokens": max(2048, max_model_len),
            "max_num_seqs": 1,
            "enable_prefix_caching": False,  # the hidden states of every position are wanted
            "enforce_eager": True,  # a captured graph would pass the hook by
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
        }
        if current_platform.is_cpu():
            settings["dtype"] = "float32"
            blocks = -(-max_model_len // _KV_BLOCK_SIZE) + _KV_BLOCKS_TO_SPARE
            settings["kv_cache_memory_bytes"] = blocks * _KV_BLOCK_SIZE * family.shape.kv_bytes_per_token(4)
        self._family = family
        self._ids = itertools.count()
        self._llm = LLM(model=str(family.path), **{**settings, **family.engine_args, **(engine_args or {})})
        self._llm.apply_model(_keep_hidden_states)

    def close(self) -> None:
        """Stop the engine and free what it holds."""
        import gc

        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        cleanup_dist_env_and_memory()

    def logits(self, prompt: dict[str, Any], num_tokens: int, columns: Tensor) -> Tensor:
        """float32 logits [num_tokens, V] after the last so many tokens of a prompt, at the token ids `columns` [V]."""
        from vllm import SamplingParams

        engine, end = self._llm.llm_engine, len(prompt["prompt_token_ids"])
        engine.add_request(str(next(self._ids)), prompt, SamplingParams(max_tokens=1, temperature=0, detokenize=False))
        while engine.has_unfinished_requests():
            engine.step()
        collect = functools.partial(_collect_logits, first=end - num_tokens, end=end, columns=columns.tolist())
        # Every rank takes part in the product with the vocabulary; the first has the whole of it.
        found: list[Tensor] = [part for part in self._llm.apply_model(collect) if part is not None]
        return found[0]

    def target_probs(self, picture: PictureRequest, token_ids: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Processed distributions of a picture's tokens and their columns, some rows at a time.

        Yields probs float32 [N, V] over the grammar's columns and tokens long [N], without the positions where the
        grammar leaves one token.
        """
        grammar = self._family.grammar(picture.size)
        known = token_ids[:-1]  # as if all but the last were given
        cond = self.logits(replace(picture, given_token_ids=known).engine_prompt, len(token_ids), grammar.token_ids)
        uncond = None
        if picture.sjd.is_guided:
            without = [*picture.sjd.negative_prompt_token_ids, *known]
            prompt = {"type": "token", "prompt_token_ids": without}
            uncond = self.logits(prompt, len(token_ids), grammar.token_ids)
        legal = grammar.legal_sets[grammar.set_of_position]
        free = (legal.sum(1) > 1).nonzero()[:, 0]
        columns = torch.searchsorted(grammar.token_ids, torch.tensor(token_ids))
        for rows in torch.split(free, _ROWS):
            probs = process_target(
                cond[None, rows],
                uncond_logits=None if uncond is None else uncond[None, rows],
                guidance_scale=torch.tensor([picture.sjd.guidance_scale]),
                legal=legal[None, rows],
                temperature=torch.tensor([picture.temperature]),
                top_k=picture.top_k,
                top_p=torch.tensor([picture.top_p]),
            )[0]
            yield probs, columns[rows]


def _keep_hidden_states(model: nn.Module) -> None:
    def keep(module: nn.Module, _: Any, output: Any) -> None:
        setattr(module, _HIDDEN, output)

    model.register_forward_hook(keep)


def _collect_logits(model: nn.Module, *, first: int, end: int, columns: list[int]) -> Tensor | None:
    hidden = getattr(model, _HIDDEN)[first:end]
    logits = model.compute_logits(hidden)  # type: ignore[operator]
    return None if logits is None else logits[:, columns].float().cpu()
