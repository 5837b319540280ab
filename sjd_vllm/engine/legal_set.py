"""The tokens that are legal at some positions, and the choices of the noise among them: compiled where it can be."""

from __future__ import annotations

import torch
from torch import Tensor

from sjd_kernels.gumbel_choices_cpu import gumbel_choices_cpu
from sjd_vllm.core import gumbel_choices
from sjd_vllm.engine.kernels import choices, has_kernels
from sjd_vllm.engine.slot_table import Array


class LegalSet:
    """Token ids that are legal at some positions.

    Args:
        token_ids: long [V], ascending.
        device: of the logits.
    """

    def __init__(self, token_ids: Tensor, device: torch.device) -> None:
        self.token_ids: Array = token_ids.numpy()
        self._device = device
        self._device_ids = token_ids.to(device)
        first, last = int(token_ids[0]), int(token_ids[-1])
        # a contiguous range of ids is a view of the logits, not a copy
        self._range = slice(first, last + 1) if last - first + 1 == len(token_ids) else None

    def choices(
        self,
        logits: Tensor,
        *,
        rows: Array,
        uncond_rows: Array,
        guidance_scale: Array,
        temperature: Array,
        top_k: Array,
        top_p: Array,
        seeds: Array,
        positions: Array,
    ) -> Array:
        """What the noise picks, token ids int64 [N]; -1 where the logits are NaN or all -inf.

        logits: [M, vocabulary]; rows, uncond_rows: int64 [N] into it, the same where there is no guidance.
        The others are one value a row, as in `gumbel_choices`.
        """
        if self._range is not None and bool((top_p >= 1).all()):
            first, num_columns = int(self.token_ids[0]), len(self.token_ids)
            per_row = {
                "rows": rows,
                "uncond_rows": uncond_rows,
                "guidance_scale": guidance_scale,
                "temperature": temperature,
                "top_k": top_k,
                "seeds": seeds,
                "positions": positions,
            }
            if logits.device.type == "cpu" and logits.dtype == torch.float32:
                return gumbel_choices_cpu(logits.numpy(), first, num_columns, **per_row)
            if has_kernels(logits.device):
                return choices(logits, first, num_columns, **per_row)
        columns = logits[:, self._range] if self._range is not None else logits[:, self._device_ids]
        is_guided = bool((guidance_scale != 1).any())
        highest, lowest = int(top_k.max()), int(top_k.min())
        chosen = gumbel_choices(
            columns[self._to_device(rows)].float(),
            self._device_ids,
            seeds=self._to_device(seeds),
            positions=self._to_device(positions),
            uncond_logits=columns[self._to_device(uncond_rows)].float() if is_guided else None,
            guidance_scale=self._to_device(guidance_scale) if is_guided else None,
            temperature=self._to_device(temperature) if (temperature != 1).any() else None,
            # one value for all rows selects without a count a row
            top_k=None if highest == 0 else highest if highest == lowest else self._to_device(top_k),
            top_p=self._to_device(top_p) if (top_p < 1).any() else None,
            max_top_k=highest,
        )
        ids: Array = chosen.cpu().numpy()
        return ids

    def _to_device(self, values: Array) -> Tensor:
        return torch.from_numpy(values).to(self._device)
