"""Image grammars: which token ids are legal at each position of a picture.

Dimension letters: T tokens of a picture, S legal sets, V ids that are legal anywhere (columns).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageGrammar:
    """The token sequence of one picture size.

    A position's legal set has one id where the family forces a token (end of line, end of image).

    Attributes:
        token_ids: long [V], ascending; every id that is legal at some position. A column is an index into it.
        legal_sets: bool [S, V]; the legal columns of each set, at least one each.
        set_of_position: long [T]; the legal set of each position, counted from the first generated token.
        row_stride: tokens from one image token to the one below it (columns and end-of-line included).
        grid: (rows, columns) of image tokens.
        code_positions: long [rows * columns]; where the picture's codes stand, row by row.
        first_code_id: token id of code 0.
    """

    token_ids: Tensor
    legal_sets: Tensor
    set_of_position: Tensor
    row_stride: int
    grid: tuple[int, int]
    code_positions: Tensor
    first_code_id: int

    def __post_init__(self) -> None:
        if not bool(self.legal_sets.any(dim=1).all()):
            raise ValueError("every legal set of a grammar needs at least one legal id")

    @property
    def num_tokens(self) -> int:
        """T: how many tokens a finished picture has."""
        return len(self.set_of_position)

    @cached_property
    def row_ends(self) -> list[int]:
        """After how many tokens each row of image tokens is finished; an end of line may follow."""
        columns = self.grid[1]
        return [int(position) + 1 for position in self.code_positions[columns - 1 :: columns]]

    @cached_property
    def _ranges_of_set(self) -> list[list[list[int]]]:
        return [_ranges(self.token_ids[columns].tolist()) for columns in self.legal_sets]

    def legal_token_ranges(self) -> list[list[list[int]]]:
        """For each of the T positions, the [first, end) ranges of token ids that are legal there."""
        return [self._ranges_of_set[i] for i in self.set_of_position.tolist()]

    def codes(self, token_ids: list[int]) -> Tensor:
        """Codebook indices, long [finished rows, columns], of a picture's tokens so far.

        Raises ValueError for an id that the grammar forbids at its position.
        """
        ids = torch.tensor(token_ids, dtype=torch.long)
        if len(ids) > self.num_tokens:
            raise ValueError(f"a picture has {self.num_tokens} tokens; got {len(ids)}")
        columns = torch.searchsorted(self.token_ids, ids).clamp_max(len(self.token_ids) - 1)
        legal = self.legal_sets[self.set_of_position[: len(ids)], columns] & (self.token_ids[columns] == ids)
        if not bool(legal.all()):
            position = int((~legal).nonzero()[0])
            raise ValueError(f"token id {token_ids[position]} is not legal at position {position} of a picture")
        width = self.grid[1]
        known = int((self.code_positions < len(ids)).sum()) // width
        return (ids[self.code_positions[: known * width]] - self.first_code_id).view(known, width)


def grid_grammar(
    *,
    first_code_id: int,
    num_codes: int,
    rows: int,
    columns: int,
    eol_token_id: int | None,
    eoi_token_id: int | None,
) -> ImageGrammar:
    """Rows of codes, each closed by end-of-line, the whole by end-of-image (either may be absent).

    Codes are the contiguous ids [first_code_id, first_code_id + num_codes).
    """
    specials = [i for i in (eol_token_id, eoi_token_id) if i is not None]
    ids = torch.tensor(sorted({*range(first_code_id, first_code_id + num_codes), *specials}), dtype=torch.long)
    codes = (ids >= first_code_id) & (ids < first_code_id + num_codes)
    legal_sets = torch.stack([codes, *(ids == i for i in specials)])
    row = [0] * columns + ([1] if eol_token_id is not None else [])
    sequence = row * rows + ([len(specials)] if eoi_token_id is not None else [])
    set_of_position = torch.tensor(sequence, dtype=torch.long)
    return ImageGrammar(
        token_ids=ids,
        legal_sets=legal_sets,
        set_of_position=set_of_position,
        row_stride=len(row),
        grid=(rows, columns),
        code_positions=(set_of_position == 0).nonzero()[:, 0],
        first_code_id=first_code_id,
    )


def _ranges(ids: list[int]) -> list[list[int]]:
    out: list[list[int]] = []
    for i in ids:
        if out and out[-1][1] == i:
            out[-1][1] = i + 1
        else:
            out.append([i, i + 1])
    return out
