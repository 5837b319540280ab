"""Image grammars: which token ids are legal at each position of a picture.

Dimension letters: T tokens of a picture, S legal sets, V ids that are legal anywhere (columns), K codes.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        code_of_column: long [V]; the codebook index that a column stands for, -1 where it is no code.
    """

    token_ids: Tensor
    legal_sets: Tensor
    set_of_position: Tensor
    row_stride: int
    grid: tuple[int, int]
    code_positions: Tensor
    code_of_column: Tensor

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

    @cached_property
    def _id_of_code(self) -> Tensor:
        ids = torch.full((int(self.code_of_column.max()) + 1,), -1, dtype=torch.long)
        is_code = self.code_of_column >= 0
        ids[self.code_of_column[is_code]] = self.token_ids[is_code]
        return ids

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
        return self.code_of_column[columns[self.code_positions[: known * width]]].view(known, width)

    def tokens(self, codes: Tensor) -> list[int]:
        """The picture's first tokens, up to and including the last of the given rows and what is forced behind it.

        The inverse of `codes`. codes: long [rows given, columns]. Raises ValueError for codes of another width, more
        rows than the picture has, or a code that is not in the codebook.
        """
        rows, columns = codes.shape
        if columns != self.grid[1] or rows > self.grid[0]:
            raise ValueError(f"a picture has {self.grid[0]} rows of {self.grid[1]} codes; got {rows} of {columns}")
        flat = codes.flatten()
        if len(flat) and (int(flat.min()) < 0 or int(flat.max()) >= len(self._id_of_code)):
            raise ValueError(f"codes go from 0 to {len(self._id_of_code) - 1}")
        num_tokens = self.num_tokens if rows == self.grid[0] else int(self.code_positions[rows * columns])
        forced = self.token_ids[self.legal_sets.int().argmax(dim=1)]
        ids = forced[self.set_of_position[:num_tokens]]
        ids[self.code_positions[: len(flat)]] = self._id_of_code[flat]
        out: list[int] = ids.tolist()
        return out


def grid_grammar(
    *,
    code_ids: Sequence[int],
    rows: int,
    columns: int,
    end_of_row: Sequence[int] = (),
    end_of_image: Sequence[int] = (),
) -> ImageGrammar:
    """Rows of codes, each closed by forced ids, and the whole closed by further ones (either may be none).

    Args:
        code_ids: the token id of each code of the codebook, K of them, all different.
        end_of_row: forced after every row, the last one included.
        end_of_image: forced after the last row's own end.

    >>> grammar = grid_grammar(code_ids=[10, 11, 12], rows=2, columns=2, end_of_row=[1], end_of_image=[2])
    >>> grammar.num_tokens, grammar.row_ends
    (7, [2, 5])
    >>> grammar.codes([10, 12, 1, 11, 11, 1, 2]).tolist()
    [[0, 2], [1, 1]]
    """
    specials = list(dict.fromkeys([*end_of_row, *end_of_image]))
    if set(specials) & set(code_ids) or len(set(code_ids)) != len(code_ids):
        raise ValueError("the ids of codes must be different from each other and from the forced ids")
    ids = torch.tensor(sorted([*code_ids, *specials]), dtype=torch.long)
    code_of_column = torch.full((len(ids),), -1, dtype=torch.long)
    code_of_column[torch.searchsorted(ids, torch.tensor(code_ids, dtype=torch.long))] = torch.arange(len(code_ids))
    legal_sets = torch.stack([code_of_column >= 0, *(ids == i for i in specials)])
    set_of_id = {token_id: index + 1 for index, token_id in enumerate(specials)}
    row = [0] * columns + [set_of_id[i] for i in end_of_row]
    set_of_position = torch.tensor(row * rows + [set_of_id[i] for i in end_of_image], dtype=torch.long)
    return ImageGrammar(
        token_ids=ids,
        legal_sets=legal_sets,
        set_of_position=set_of_position,
        row_stride=len(row),
        grid=(rows, columns),
        code_positions=(set_of_position == 0).nonzero()[:, 0],
        code_of_column=code_of_column,
    )


def _ranges(ids: list[int]) -> list[list[int]]:
    out: list[list[int]] = []
    for i in ids:
        if out and out[-1][1] == i:
            out[-1][1] = i + 1
        else:
            out.append([i, i + 1])
    return out
