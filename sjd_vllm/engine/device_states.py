"""Requests under fixed noise on the device, by the slot that Model Runner V2 gives them.

A step reads and writes everything here on the device, without asking it anything: which request is ready, how far it
is and how many of its drafts are final stays there, and the host learns the tokens with vLLM's own asynchronous copy.
The host knows what does not change from step to step (settings, pairs, legal tokens), keeps that by slot too, and
sends one array a step: which rows of the batch belong together.

Each request has its whole sequence as drafts from the start, as in `fixed_noise_pool`.

Dimension letters: S slots, T positions of the longest sequence, W longest window, B rows of the batch, R pictures that
have all their rows in it, N scored positions of these, M rows of the logits, V ids of a legal set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from sjd_vllm.config import SJDConfig, SJDParams
from sjd_vllm.core import sweep, uniform_choice
from sjd_vllm.engine.batch_step import ScoredRows
from sjd_vllm.engine.drafting_rule import DraftingRule
from sjd_vllm.engine.guidance_pairs import RunnerArgs
from sjd_vllm.engine.legal_set import LegalSet, SettingsSpan
from sjd_vllm.engine.slot_table import Array
from sjd_vllm.models.family import ImageFamily

_NOBODY = -1


@dataclass(frozen=True)
class _Positions:
    """A rule's legal tokens by position, for as long as a request has the rule.

    Attributes:
        key: number of the rule.
        sets: numbers of its legal sets.
        set_of_position: int64 [T + W + 1] on the device; numbers of sets, those after the end repeat the last.
        num_legal: int64 [T + W + 1] on the device.
    """

    key: int
    sets: tuple[int, ...]
    set_of_position: Tensor
    num_legal: Tensor


class DeviceStates:
    """All requests of a V2 runner.

    Args:
        max_num_reqs: S.
        max_num_tokens: T.
    """

    def __init__(
        self,
        config: SJDConfig,
        family: ImageFamily | None,
        *,
        vocab_size: int,
        max_num_reqs: int,
        max_num_tokens: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self._family = family
        self._vocab_size = vocab_size
        self._max_num_tokens = max_num_tokens
        self._device = device
        # a request that has all its tokens may be scored once more before the host knows, so W + 1 positions follow
        self._num_positions = max_num_tokens + config.num_speculative_tokens + 1
        shape = (max_num_reqs, self._num_positions)
        self._drafts = torch.zeros(shape, dtype=torch.int64, device=device)
        self._set_of_position = torch.zeros(shape, dtype=torch.int16, device=device)
        self._seed = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        self._num_tokens = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        self._num_given = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        self._main = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)  # the slot whose drafts a slot has
        settings = {
            "guidance_scale": np.ones(max_num_reqs, np.float32),
            "temperature": np.ones(max_num_reqs, np.float32),
            "top_k": np.zeros(max_num_reqs, np.int64),
            "top_p": np.ones(max_num_reqs, np.float32),
        }
        self._settings = settings
        self._device_settings = {name: torch.from_numpy(column).to(device) for name, column in settings.items()}
        # slots of the other halves; an unguided request is its own; _NOBODY where it is not there
        self._partner = np.full(max_num_reqs, _NOBODY)
        self._is_main = np.zeros(max_num_reqs, dtype=bool)
        self._rule_of_slot = np.full(max_num_reqs, _NOBODY)
        self._slots: dict[str, int] = {}
        self._rules: dict[DraftingRule, tuple[_Positions, set[int]]] = {}  # with the slots that have it
        self._rule_keys: dict[int, DraftingRule] = {}
        self._sets: list[LegalSet | None] = []
        self._only_id = torch.zeros(0, dtype=torch.int64, device=device)  # by set; -1 where several ids are legal

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._slots

    @property
    def num_rules(self) -> int:
        """Rules, and with them legal sets, that are in use."""
        return len(self._rules)

    def add(self, request_id: str, slot: int, sampling: Any, runner_args: RunnerArgs) -> None:
        """Take a request, new or resumed, into a slot that is free; everything that the slot had is overwritten."""
        # whatever fails below, the slot is this request's, and nothing is emitted for it
        self._slots[request_id] = slot
        self._is_main[slot], self._partner[slot], self._rule_of_slot[slot] = False, _NOBODY, _NOBODY
        self._main[slot] = slot
        if not runner_args.is_companion:
            self._fill_slot(slot, sampling, runner_args.seed)
        partner = slot if runner_args.partner is None else self._slots.get(runner_args.partner, _NOBODY)
        self._partner[slot] = partner
        if partner not in (slot, _NOBODY):
            self._partner[partner] = slot
            main, companion = (partner, slot) if runner_args.is_companion else (slot, partner)
            self._main[companion] = main
        self._is_main[slot] = not runner_args.is_companion

    def _fill_slot(self, slot: int, sampling: Any, seed: int) -> None:
        params = SJDParams.from_extra_args(sampling.extra_args)
        positions = self._take_rule(DraftingRule.of(params, sampling, self.config, self._family), slot)
        self._set_of_position[slot] = positions.set_of_position
        self._drafts[slot] = self._first_guesses(positions, seed)
        self._seed[slot] = seed
        self._num_given[slot] = params.num_given_tokens
        self._num_tokens[slot] = params.num_given_tokens + sampling.max_tokens
        values = {
            "guidance_scale": params.guidance_scale,
            "temperature": sampling.temperature,
            "top_k": max(sampling.top_k, 0),
            "top_p": sampling.top_p,
        }
        for name, value in values.items():
            self._settings[name][slot] = value
            self._device_settings[name][slot] = value

    def remove(self, request_id: str) -> None:
        """Forget a request that has finished or was preempted; unknown ids are ignored."""
        slot = self._slots.pop(request_id, None)
        if slot is None:
            return
        partner = int(self._partner[slot])
        if partner not in (slot, _NOBODY):
            self._partner[partner] = _NOBODY
            self._main[partner] = partner
        self._partner[slot] = _NOBODY
        key = int(self._rule_of_slot[slot])
        if key != _NOBODY:
            self._rule_of_slot[slot] = _NOBODY
            self._leave_rule(key, slot)

    def fill_inputs(self, batch: Any, states: Any) -> None:
        """Write the tokens that the forward reads at scored positions: the last known one, then the drafts.

        batch: vLLM's InputBatch, whose `input_ids` are changed; states: its RequestState. The known token is written
        because a half that was held reads its last one again, which stock code does not foresee at a prompt's end.
        """
        slots, offsets = batch.expanded_idx_mapping.long(), batch.expanded_local_pos.long()
        row_of_slot = self._row_of_slot(batch)
        num_known = states.total_len.gpu[slots].long()
        main = self._main[slots]
        position = num_known - states.prompt_len.gpu[slots] + self._num_given[main] + offsets - 1
        drafts = self._drafts[main, position.clamp(0, self._num_positions - 1)]
        known = states.all_token_ids.gpu[slots, (num_known - 1).clamp(min=0)]
        tokens = torch.where(offsets == 0, known.long(), drafts).to(batch.input_ids.dtype)
        # the rows of a prompt that goes on after this step score nothing
        is_scored = batch.seq_lens[row_of_slot[slots]] >= states.prefill_len.gpu[slots]
        at = batch.logits_indices
        batch.input_ids[at] = torch.where(is_scored, tokens, batch.input_ids[at])

    def step(self, logits: Tensor, batch: Any, states: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Score, emit and refresh -> (tokens int64 [B, W' + 1], how many count int32 [B], how many logits do not [B]).

        logits: [M, vocabulary]; batch, states: vLLM's InputBatch and RequestState. A half whose other half is not
        ready emits nothing, and all its scored tokens are computed again.
        """
        num_rows = batch.num_reqs
        num_logits = np.diff(batch.cu_num_logits_np[: num_rows + 1])
        num_rejected = torch.diff(batch.cu_num_logits[: num_rows + 1])
        tokens = torch.full((num_rows, self.config.num_speculative_tokens + 1), -1, device=self._device)
        num_sampled = torch.zeros(num_rows, dtype=torch.int32, device=self._device)
        rows = self._rows(batch.idx_mapping_np[:num_rows], num_logits)
        if len(rows):
            self._emit(logits, batch, states, rows, tokens, num_sampled)
        slots = batch.idx_mapping[:num_rows]
        is_scored = batch.seq_lens[:num_rows] >= states.prefill_len.gpu[slots]
        return tokens, num_sampled, torch.where(is_scored, num_rejected - num_sampled, 0).int()

    def _emit(
        self, logits: Tensor, batch: Any, states: Any, rows: ScoredRows, tokens: Tensor, num_sampled: Tensor
    ) -> None:
        first = batch.cu_num_logits_np.astype(np.int64)
        cond, uncond, starts, owner, offsets, cond_logits, uncond_logits = self._to_device(
            rows.cond,
            rows.uncond,
            rows.starts,
            rows.owner,
            rows.offsets,
            first[rows.cond[rows.owner]] + rows.offsets,
            first[rows.uncond[rows.owner]] + rows.offsets,
        )
        slots = batch.idx_mapping[cond]
        num_known, num_known_uncond = self._num_known(states, slots), self._num_known(states, batch.idx_mapping[uncond])
        is_ready = num_known == num_known_uncond
        for half in (cond, uncond):
            is_ready &= batch.seq_lens[half] >= states.prefill_len.gpu[batch.idx_mapping[half]]
        begin = num_known + self._num_given[slots]
        own, positions = slots[owner], begin[owner] + offsets
        choices = self._choices(batch, rows, logits, own, positions, cond_logits, uncond_logits)
        choices = torch.where(is_ready[owner], choices, -1)
        num_final = sweep(self._drafts, own, positions, choices, starts)
        # nothing is emitted from the first position on that has no choice, nor after the end of the sequence
        without = torch.where(choices < 0, offsets, self._num_positions)
        num_final = num_final.scatter_reduce(0, owner, without, "amin")
        num_final = torch.minimum(num_final, self._num_tokens[slots] - begin).clamp(min=0).int()
        for half in (cond, uncond):
            tokens[half[owner], offsets] = choices
            num_sampled[half] = num_final

    def _choices(
        self,
        batch: Any,
        rows: ScoredRows,
        logits: Tensor,
        own: Tensor,
        positions: Tensor,
        cond_logits: Tensor,
        uncond_logits: Tensor,
    ) -> Tensor:
        """Token ids int64 [N]. Every legal set of these requests chooses in all rows, and each row takes its own's."""
        slots = batch.idx_mapping_np[rows.cond]
        span = SettingsSpan.of(**{name: column[slots] for name, column in self._settings.items()})
        per_row = {name: column[own] for name, column in self._device_settings.items()}
        set_of_row = self._set_of_position[own, positions].long()
        choices = self._only_id[set_of_row]
        for index in self._open_sets(slots):
            chosen = self._set(index).choices(
                logits,
                span,
                rows=cond_logits,
                uncond_rows=uncond_logits,
                seeds=self._seed[own],
                positions=positions,
                **per_row,
            )
            choices = torch.where(set_of_row == index, chosen, choices)
        return choices

    def _rows(self, slots: Array, num_logits: Array) -> ScoredRows:
        """The pictures that have all their rows in the batch; slots, num_logits: int [B]."""
        row_of_slot = np.full(len(self._partner) + 1, _NOBODY)  # the last place is nobody's
        row_of_slot[slots] = np.arange(len(slots))
        partner_row = row_of_slot[self._partner[slots]]
        cond = np.flatnonzero(self._is_main[slots] & (partner_row != _NOBODY))
        uncond = partner_row[cond]
        return ScoredRows(cond, uncond, np.minimum(num_logits[cond], num_logits[uncond]).astype(np.int64) - 1)

    def _open_sets(self, slots: Array) -> list[int]:
        """Numbers of the sets with several ids that some of the slots' requests have."""
        numbers: set[int] = set()
        for key in np.unique(self._rule_of_slot[slots]).tolist():
            numbers.update(self._rules[self._rule_keys[key]][0].sets)
        return sorted(n for n in numbers if len(self._set(n).token_ids) > 1)

    def _row_of_slot(self, batch: Any) -> Tensor:
        slots = batch.idx_mapping[: batch.num_reqs]
        rows = torch.zeros(len(self._drafts), dtype=torch.int64, device=self._device)
        rows[slots] = torch.arange(batch.num_reqs, device=self._device)
        return rows

    @staticmethod
    def _num_known(states: Any, slots: Tensor) -> Tensor:
        """Tokens written so far, int64."""
        num_known: Tensor = states.total_len.gpu[slots].long() - states.prompt_len.gpu[slots]
        return num_known

    def _to_device(self, *arrays: Array) -> list[Tensor]:
        """Some int64 arrays in one copy."""
        packed = async_tensor_h2d(np.concatenate(arrays), device=self._device)
        return list(packed.split([len(array) for array in arrays]))

    def _set(self, number: int) -> LegalSet:
        legal = self._sets[number]
        assert legal is not None
        return legal

    def _take_rule(self, rule: DraftingRule, slot: int) -> _Positions:
        if rule not in self._rules:
            key = next(n for n in range(len(self._rule_keys) + 1) if n not in self._rule_keys)
            self._rules[rule] = (self._new_positions(rule, key), set())
            self._rule_keys[key] = rule
        positions, members = self._rules[rule]
        members.add(slot)
        self._rule_of_slot[slot] = positions.key
        return positions

    def _leave_rule(self, key: int, slot: int) -> None:
        rule = self._rule_keys[key]
        positions, members = self._rules[rule]
        members.discard(slot)
        if members:
            return
        del self._rules[rule], self._rule_keys[key]
        in_use = {number for other, _ in self._rules.values() for number in other.sets}
        for number in positions.sets:
            if number not in in_use:
                self._sets[number] = None

    def _new_positions(self, rule: DraftingRule, key: int) -> _Positions:
        legal_sets, set_of_position = rule.legal_sets(self._vocab_size, self._max_num_tokens)
        numbers = np.array([self._number_of(ids) for ids in legal_sets])
        padded = np.pad(set_of_position, (0, self._num_positions - len(set_of_position)), mode="edge")
        counts = np.array([len(ids) for ids in legal_sets])
        self._only_id = torch.tensor(
            [_NOBODY if legal is None else legal.only_id for legal in self._sets], device=self._device
        )
        return _Positions(
            key=key,
            sets=tuple(numbers.tolist()),
            set_of_position=torch.from_numpy(numbers[padded]).to(self._device),
            num_legal=torch.from_numpy(counts[padded]).to(self._device),
        )

    def _number_of(self, token_ids: Tensor) -> int:
        """The number of a legal set, the same for the same ids: pictures of different sizes choose together."""
        for number, legal in enumerate(self._sets):
            if legal is not None and torch.equal(legal.token_ids, token_ids):
                return number
        number = next((n for n, legal in enumerate(self._sets) if legal is None), len(self._sets))
        self._sets[number : number + 1] = [LegalSet(token_ids, self._device)]
        return number

    def _first_guesses(self, positions: _Positions, seed: int) -> Tensor:
        """Any legal token at each position, equally likely: int64 [T + W + 1]."""
        at = torch.arange(self._num_positions, device=self._device)
        places = uniform_choice(positions.num_legal, seeds=torch.full_like(at, seed), positions=at)
        guesses = self._only_id[positions.set_of_position]
        for number in positions.sets:
            ids = self._set(number).device_ids
            named = ids[places.clamp(max=len(ids) - 1)]
            guesses = torch.where(positions.set_of_position == number, named, guesses)
        return guesses
