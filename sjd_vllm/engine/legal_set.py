"""The tokens that are legal at some positions, and the choices of the noise among them: compiled where it can be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sjd_kernels.gumbel_choices_cpu import gumbel_choices_cpu
from sjd_vllm.core import gumbel_choices
from sjd_vllm.engine.kernels import gumbel_choices_cuda, has_kernels
from sjd_vllm.engine.slot_table import Array


@dataclass(frozen=True)
class SettingsSpan:
    """What the requests of a step ask for together; the host knows it, so that the device need not be asked."""

    is_guided: bool
    has_temperature: bool
    has_top_p: bool
    lowest_top_k: int
    highest_top_k: int

    @classmethod
    def of(cls, guidance_scale: Array, temperature: Array, top_k: Array, top_p: Array) -> SettingsSpan:
        """From the settings of at least one request, arrays of one length."""
        return cls(
            is_guided=bool((guidance_scale != 1).any()),
            has_temperature=bool((temperature != 1).any()),
            has_top_p=bool((top_p < 1).any()),
            lowest_top_k=int(top_k.min()),
            highest_top_k=int(top_k.max()),
        )


class LegalSet:
    """Token ids that are legal at some positions.

    Attributes:
        token_ids: long [V], ascending.
        device_ids: the same on the device.
        only_id: the id where there is one alone, else -1.

    Args:
        device: of the logits.
    """

    def __init__(self, token_ids: Tensor, device: torch.device) -> None:
        self.token_ids = token_ids
        self.only_id = int(token_ids[0]) if len(token_ids) == 1 else -1
        self.device_ids = token_ids.to(device)
        first, last = int(token_ids[0]), int(token_ids[-1])
        # a contiguous range of ids is a view of the logits, not a copy
        self._range = slice(first, last + 1) if last - first + 1 == len(token_ids) else None

    def choices(
        self,
        logits: Tensor,
        span: SettingsSpan,
        *,
        rows: Tensor,
        uncond_rows: Tensor,
        guidance_scale: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        seeds: Tensor,
        positions: Tensor,
    ) -> Tensor:
        """What the noise picks, token ids int64 [N]; -1 where the logits are NaN or all -inf. Does not wait for a GPU.

        logits: [M, vocabulary]; rows, uncond_rows: int64 [N] into it, the same where there is no guidance.
        span: of the requests that the rows belong to.
        The others are one value a row, as in `gumbel_choices`, on the logits' device.
        """
        is_on_cpu = logits.device.type == "cpu"
        if self._range is not None and not span.has_top_p:
            first, num_columns = self._range.start, len(self.token_ids)
            per_row = {
                "rows": rows,
                "uncond_rows": uncond_rows,
                "guidance_scale": guidance_scale,
                "temperature": temperature,
                "top_k": top_k,
                "seeds": seeds,
                "positions": positions,
            }
            if is_on_cpu and logits.dtype == torch.float32:
                arrays = {name: values.numpy() for name, values in per_row.items()}
                return torch.from_numpy(gumbel_choices_cpu(logits.numpy(), first, num_columns, **arrays))
            if has_kernels(logits.device):
                return gumbel_choices_cuda(logits, first, num_columns, **per_row)
        columns = logits[:, self._range] if self._range is not None else logits[:, self.device_ids]
        # one value for all rows selects without a count a row, but looks at what it selected
        is_one_top_k = is_on_cpu and span.lowest_top_k == span.highest_top_k
        return gumbel_choices(
            columns[rows].float(),
            self.device_ids,
            seeds=seeds,
            positions=positions,
            uncond_logits=columns[uncond_rows].float() if span.is_guided else None,
            guidance_scale=guidance_scale if span.is_guided else None,
            temperature=temperature if span.has_temperature else None,
            top_k=None if span.highest_top_k == 0 else span.highest_top_k if is_one_top_k else top_k,
            top_p=top_p if span.has_top_p else None,
            max_top_k=span.highest_top_k,
        )
