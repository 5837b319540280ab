"""Pairs of requests under classifier-free guidance: the user's own and its hidden, unconditional companion.

The companion is an ordinary request to vLLM: own prompt, own blocks, own place in the queue. What makes the two a
pair is that neither emits a token unless both can, and that both then get the same one.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from sjd_vllm.config import SJDParams

_COMPANION_SUFFIX = "#uncond"
_KEY = "sjd_runner"  # of extra_args, for RunnerArgs


@dataclass(frozen=True)
class RunnerArgs:
    """What the scheduler tells the runner about a request, beside the user's own settings.

    Attributes:
        seed: key of its noise.
        window: the longest window that it may have.
        is_adaptive: whether the scheduler may shorten it.
        partner: id of the other half of a guidance pair; None without guidance.
        is_companion: whether it is the hidden half.
    """

    seed: int
    window: int
    is_adaptive: bool
    partner: str | None = None
    is_companion: bool = False

    @classmethod
    def of(cls, sampling: Any) -> RunnerArgs | None:
        """Those of a prepared request's SamplingParams; None if it was not prepared (a runner's own warm-up)."""
        given = (sampling.extra_args or {}).get(_KEY)
        return None if given is None else cls(**given)


def prepare_request(request: Request, runner_args: RunnerArgs) -> None:
    """Give the request SamplingParams of its own that carry the arguments for the runner.

    Requests of one n > 1 call share one SamplingParams object when the engine runs in-process. The seed moves out
    of vLLM's field, because vLLM would build a stateful generator from it, which is neither used nor rewound right.
    """
    params: SamplingParams = copy.copy(request.sampling_params)
    params.seed = None
    params.extra_args = {**(params.extra_args or {}), _KEY: asdict(runner_args)}
    request.sampling_params = params


def noise_seed(request: Request) -> int:
    """The request's own seed, or a random one; drawn here, once, so that all tensor-parallel ranks agree."""
    seed = request.sampling_params.seed
    return secrets.randbits(62) if seed is None else int(seed)


class GuidancePairs:
    """Who belongs to whom, as long as both live."""

    def __init__(self) -> None:
        self._partner: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._partner) // 2

    @staticmethod
    def is_companion(request_id: str) -> bool:
        """Whether the id is that of a hidden companion."""
        return request_id.endswith(_COMPANION_SUFFIX)

    def partner(self, request_id: str) -> str | None:
        """The other half's id, or None for an unguided request."""
        return self._partner.get(request_id)

    def with_partners(self, request_ids: Iterable[str]) -> set[str]:
        """The ids and those of their other halves."""
        ids = set(request_ids)
        return ids | {self._partner[i] for i in ids if i in self._partner}

    def companions(self) -> list[tuple[str, str]]:
        """(companion, main) of every pair."""
        return [(a, b) for a, b in self._partner.items() if self.is_companion(a)]

    def open(self, main: Request, params: SJDParams, runner_args: RunnerArgs) -> Request:
        """Make the companion of an admitted request and mark both as halves of a pair.

        runner_args: of the main, its partner aside.
        """
        companion_id = main.request_id + _COMPANION_SUFFIX
        companion = Request(
            request_id=companion_id,
            prompt_token_ids=list(params.negative_prompt_token_ids),
            sampling_params=_endless(main.sampling_params),
            pooling_params=None,
            client_index=main.client_index,
            arrival_time=main.arrival_time,
            lora_request=main.lora_request,
            cache_salt=main.cache_salt,
            priority=main.priority,
            block_hasher=main._block_hasher,
        )
        prepare_request(main, replace(runner_args, partner=companion_id))
        prepare_request(companion, replace(runner_args, partner=main.request_id, is_companion=True))
        self._partner[companion_id] = main.request_id
        self._partner[main.request_id] = companion_id
        return companion

    def close(self, request_id: str) -> None:
        """Forget the pair of either half's id; an unknown id is ignored."""
        other = self._partner.pop(request_id, None)
        if other is not None:
            self._partner.pop(other, None)


def _endless(params: Any) -> SamplingParams:
    """A companion never stops by itself: it ends when its main does."""
    endless: SamplingParams = copy.copy(params)
    endless.max_tokens = 1 << 30  # the runners keep sums with it as int32
    endless.ignore_eos = True
    endless.stop = []
    endless.stop_token_ids = []
    endless._eos_token_id = None
    endless._all_stop_token_ids = set()
    return endless
