"""Image grammars: what is legal where, and which tokens are the picture's codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sjd_vllm.models.grammar import ImageGrammar, grid_grammar
from sjd_vllm.models.registry import load_family

EOL, EOI = 40, 5


def grammar(*, eol: int | None = EOL, eoi: int | None = EOI) -> ImageGrammar:
    return grid_grammar(
        code_ids=range(10, 18),
        rows=2,
        columns=3,
        end_of_row=[] if eol is None else [eol],
        end_of_image=[] if eoi is None else [eoi],
    )


def test_rows_end_with_end_of_line_and_the_picture_with_end_of_image() -> None:
    ranges = grammar().legal_token_ranges()
    codes, eol, eoi = [[10, 18]], [[EOL, EOL + 1]], [[EOI, EOI + 1]]
    assert ranges == [codes, codes, codes, eol, codes, codes, codes, eol, eoi]
    assert grammar().num_tokens == 9
    assert grammar().row_stride == 4
    assert grammar().row_ends == [3, 7]


def test_families_without_special_tokens() -> None:
    plain = grammar(eol=None, eoi=None)
    assert plain.legal_token_ranges() == [[[10, 18]]] * 6
    assert plain.row_stride == 3


def test_legal_columns_are_those_of_the_ranges() -> None:
    g = grammar()
    for position, ranges in enumerate(g.legal_token_ranges()):
        legal = g.token_ids[g.legal_sets[g.set_of_position[position]]].tolist()
        assert legal == [i for first, end in ranges for i in range(first, end)]


def test_codes_of_whole_and_of_unfinished_pictures() -> None:
    tokens = [10, 11, 12, EOL, 13, 14, 17, EOL, EOI]
    assert grammar().codes(tokens).tolist() == [[0, 1, 2], [3, 4, 7]]
    assert grammar().codes(tokens[:6]).tolist() == [[0, 1, 2]]
    assert grammar().codes(tokens[:3]).tolist() == [[0, 1, 2]]
    assert grammar().codes([]).shape == (0, 3)


@pytest.mark.parametrize(
    ("tokens", "position"),
    [([10, 11, 12, 13], 3), ([EOL], 0), ([10, 18], 1), ([10, 9], 1), ([10, 1000], 1)],
)
def test_an_illegal_token_is_named_with_its_position(tokens: list[int], position: int) -> None:
    with pytest.raises(ValueError, match=f"position {position}"):
        grammar().codes(tokens)


def test_too_many_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="9 tokens"):
        grammar().codes([10] * 10)


def test_a_position_without_a_legal_id_is_refused() -> None:
    g = grammar()
    with pytest.raises(ValueError, match="at least one legal id"):
        ImageGrammar(
            token_ids=g.token_ids,
            legal_sets=torch.zeros_like(g.legal_sets),
            set_of_position=g.set_of_position,
            row_stride=g.row_stride,
            grid=g.grid,
            code_positions=g.code_positions,
            code_of_column=g.code_of_column,
        )


def test_a_text_model_has_no_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert load_family(tmp_path) is None
    assert load_family(tmp_path / "missing") is None


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"sjd": {"family": "dome"}}))
    with pytest.raises(ValueError, match="known are demo"):
        load_family(tmp_path)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_tokens_of_codes_are_the_inverse_with_what_is_forced(rows: int) -> None:
    g = grammar()
    codes = torch.tensor([[0, 1, 2], [3, 4, 7]])[:rows]
    tokens = g.tokens(codes)
    assert tokens == [10, 11, 12, EOL, 13, 14, 17, EOL, EOI][: [0, 4, 9][rows]]
    assert g.codes(tokens).tolist() == codes.tolist()


def test_ids_of_codes_need_no_order() -> None:
    g = grid_grammar(code_ids=[30, 7, 12], rows=1, columns=3, end_of_row=[9, 8], end_of_image=[9, 2])
    assert g.codes([12, 30, 7, 9, 8, 9, 2]).tolist() == [[2, 0, 1]]
    assert g.tokens(torch.tensor([[2, 0, 1]])) == [12, 30, 7, 9, 8, 9, 2]
    assert g.row_stride == 5
    with pytest.raises(ValueError, match="different"):
        grid_grammar(code_ids=[3, 4], rows=1, columns=2, end_of_image=[4])


@pytest.mark.parametrize("codes", [[[0, 1]], [[0, 1, 2]] * 3, [[0, 1, 8]], [[0, -1, 2]]])
def test_codes_that_do_not_fit_are_refused(codes: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="codes"):
        grammar().tokens(torch.tensor(codes))
