"""The block-wise implementation on maps that differ by head: rows worked on together give what each gives alone."""

from __future__ import annotations

import pytest
import torch

from attlas.kernels.blocked.layout import MapLayout
from attlas.masks import Blocks, Causal, Mask, PerHead, Random, Window
from attlas.ops.attention import attention
from attlas.shapes import AuxRequest
from attlas.testing.budget import assert_budget

HEADS, DIM = 3, 11


def scattered(tokens: int, size: int) -> Mask:
    """Per head: the first and the last block, and others here and there."""
    blocks = -(-tokens // size)
    drawn = torch.rand(HEADS, blocks, blocks, generator=torch.Generator().manual_seed(0)) < 0.2
    drawn[:, :, [0, -1]] = True
    drawn[:, 0] = True
    return Blocks(drawn, size)


def layout_of(mask: Mask, tokens: int, size: int) -> MapLayout:
    return MapLayout(mask.block_map((tokens, tokens), block_q=size, block_k=size), torch.device("cpu"))


def test_rows_are_shared_out_once():
    layout = layout_of(scattered(64 * 23, 64), 64 * 23, 64)
    together, common = layout.shared_out(0, None)
    assert not together and [row.q0 for row in common] == [0]
    for head in range(HEADS):
        gangs, rest = layout.shared_out(0, head)
        firsts = sorted([64 * i for g in gangs for i in g.rows.tolist()] + [row.q0 for row in rest])
        assert firsts == list(range(64, 64 * 23, 64)) and len(gangs) > 1
        for gang in gangs:
            for i, cols in zip(gang.rows.tolist(), gang.cols.view(-1, gang.each).tolist(), strict=True):
                row = layout.map.row(0, head, i)
                assert cols == row[0].tolist() and (row[1] == -1).all()
            assert gang.run is None or gang.rows.tolist() == list(range(*gang.run))


def test_masked_pairs_are_left_to_single_rows():
    layout = layout_of(PerHead((Causal(), Causal(), Causal() & Window(128, 0))), 64 * 7, 64)
    assert [row.q0 for row in layout.shared_out(0, None)[1]] == [0, 64]
    for head in range(HEADS):
        gangs, rest = layout.shared_out(0, head)
        assert not gangs and [row.q0 for row in rest] == list(range(128, 64 * 7, 64))


def test_heads_that_are_all_alike_are_worked_on_together():
    layout = layout_of(PerHead((Causal(),) * HEADS), 64 * 7, 64)
    assert [row.q0 for row in layout.shared_out(0, None)[1]] == list(range(0, 64 * 7, 64))
    assert layout.heads == HEADS and all(layout.shared_out(0, head) == ((), ()) for head in range(HEADS))


@pytest.mark.parametrize("tokens", [64 * 23, 64 * 23 - 5])
def test_outputs_and_gradients(tokens: int):
    torch.manual_seed(0)
    mask = scattered(tokens, 64)
    given = [torch.randn(2, tokens, HEADS, DIM, dtype=torch.float64) for _ in range(3)]
    weight, lse_weight = torch.randn(2, tokens, HEADS, DIM), torch.randn(2, tokens, HEADS)

    def results(dtype: torch.dtype, impl: str) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in given]
        out, aux = attention(*leaves, mask=mask, impl=impl, return_aux=AuxRequest(lse=True))
        assert aux.lse is not None
        grads = torch.autograd.grad((out * weight).sum() + (aux.lse * lse_weight).sum(), leaves)
        return [out.detach(), aux.lse.detach(), *grads]

    truth, naive = results(torch.float64, "reference"), results(torch.float32, "reference")
    for name, got, near, exact in zip(
        ("out", "lse", "dq", "dk", "dv"), results(torch.float32, "blocked"), naive, truth, strict=True
    ):
        assert_budget(got, near, exact, name)
    with torch.no_grad():
        out = attention(*(x.float() for x in given), mask=mask, impl="blocked")
    assert_budget(out, naive[0], truth[0], "without gradients")


def test_nan_stays_where_it_is():
    """A NaN value that some rows may not see, in a map whose rows are worked on together."""
    tokens = 64 * 23
    mask = Random(3, 64, seed=1, span=23)
    mask = PerHead((mask, Random(3, 64, seed=2, span=23), mask))
    q, k, v = (torch.randn(1, tokens, HEADS, DIM) for _ in range(3))
    clean = attention(q, k, v, mask=mask, impl="blocked")
    v[:, 64:128] = torch.nan
    got = attention(q, k, v, mask=mask, impl="blocked")
    sees = mask.to_bool(tokens, tokens)[..., 64:128].any(-1).transpose(-1, -2)
    sees = sees.view(1, tokens, HEADS) if sees.dim() == 2 else sees
    torch.testing.assert_close(got[~sees], clean[~sees])
    assert got[sees].isnan().any() and (~sees).any()
