"""What is peculiar to hierarchical, axial, memory-compressed, Synthesizer and lambda mixers, and the parts that they brought."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attlas.cache.grouped import GroupedPart
from attlas.cache.layer import make_cache
from attlas.cache.part import CacheError, PartSpec
from attlas.catalogue.index import build
from attlas.errors import DataError, OptionError, ShapeError, UnsupportedError
from attlas.masks import Causal, Grid, Window
from attlas.masks.cell_patterns import BlockWindow
from attlas.masks.pooled import Pooled, pooled
from attlas.reference.multiscale import hierarchical
from attlas.shapes import SeqInfo
from attlas.testing.inputs import randn
from attlas.testing.subject import seeded


def made(name: str, dim: int, heads: int, **options: Any) -> Any:
    return seeded(build(name, dim, heads, **options), torch.float64)


def readers(mixer: Any, length: int, dim: int) -> Tensor:
    """bool [T, T]: whether output i depends on token j."""
    x = randn(1, length, dim).requires_grad_()
    y = mixer(x)
    rows = [torch.autograd.grad(y[0, i].abs().sum(), x, retain_graph=True)[0][0].abs().amax(-1) > 1e-12 for i in range(length)]
    return torch.stack(rows)


# ---- masks between tokens and groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "shift"), [(3, 1), (4, 0), (7, 0)])
@pytest.mark.parametrize(
    "inner", [Causal() & ~Window.last(1), BlockWindow(4, 1, 0) & ~BlockWindow(2, 1, 0) & Causal(), Window(2, 1)]
)
def test_pooled_masks_ask_about_groups(inner: Any, size: int, shift: int):
    mask = pooled(inner, size, shift)
    grid = Grid.at(range(5, 106), range(29))
    i, j = (torch.arange(5, 106) + shift) // size, torch.arange(29)
    want = inner.dense(Grid.at(range(-1, 60), range(29)))[i + 1][:, j]
    assert mask.dense(grid).equal(want) and want.any() and not want.all()
    assert mask.block_map(grid, block_q=16, block_k=8).to_dense()[0, 0].equal(want)
    assert mask.count(grid) == int(want.sum())
    low, high = mask.key_span(50, 60) or (1, 0)
    seen = want[45:56].any(0).nonzero().flatten()
    assert (low is None or low <= seen.min()) and (high is None or high >= seen.max())
    assert eval(repr(mask), {**globals(), "Pooled": Pooled}) == mask


# ---- entries for groups of tokens -------------------------------------------------------------------------------------------


def entries(seq: SeqInfo, part: GroupedPart, seed: int) -> tuple[Tensor, ...]:
    return (randn(sum(part.completed(seq)), 5, seed=seed),)


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
@pytest.mark.parametrize("window", [None, 2])
def test_a_grouped_part_goes_by_tokens_and_holds_entries(layout: Any, window: int | None):
    spec = PartSpec("tokens", (("x", (5,)),), window=window, group=3)
    cache = make_cache([spec], 3, 61, layout=layout, page_size=8, dtype=torch.float64)
    (part,) = cache.parts
    assert isinstance(part, GroupedPart)
    written: dict[int, list[Tensor]] = {0: [], 2: []}
    for step, (n, m) in enumerate([(2, 7), (1, 0), (47, 2), (1, 3)]):
        seq = SeqInfo((n, m), ids=(2, 0))
        counts = part.completed(seq)
        (new,) = entries(seq, part, step)
        cache.parts[0].write((new,), seq)
        cache.end_step()
        for row, piece in zip((2, 0), new.split(list(counts)), strict=True):
            written[row].extend(piece)
    assert cache.lengths == (12, 0, 51)
    for row, count in ((0, 4), (2, 17)):
        held = part.read(row)
        at = held.axis.positions()
        first = part.missing(row)[1] // 3
        assert sorted(at.tolist()) == list(range(first, count)) and first <= count - (window or count)
        assert torch.equal(held.tensors[0], torch.stack([written[row][int(i)] for i in at]))
    assert (part.missing(2)[1] > 0) == (window is not None)
    saved = {name: t.clone() for name, t in cache.save().items()}
    other = make_cache([spec], 3, None, dtype=torch.float64)
    other.load(saved)
    assert other.lengths == (12, 0, 51)
    cache.fork(2, 1)
    cache.truncate({1: 50})
    assert cache.lengths == (12, 50, 51) and part.entries.lengths == (4, 16, 17)
    cache.reorder([1, 1, 0])
    assert cache.lengths == (50, 50, 12)
    cache.reset([0])
    assert cache.lengths == (0, 50, 12) and part.entries.lengths == (0, 16, 4)
    with pytest.raises(CacheError, match="next positions"):
        part.write((randn(1, 5),), SeqInfo((3,), starts=(9,), ids=(1,)))
    with pytest.raises(CacheError, match="present length"):
        cache.truncate({1: 51})
    with pytest.raises(DataError, match="tokens"):
        other.load({**saved, "0.tokens": torch.tensor([1, 2, 3])})


# ---- hierarchical -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"causal": True}, {}, {"coarse_queries": False}])
def test_hierarchical_averages(options: dict[str, Any]):
    """A constant value stays constant: every token is counted once at every length."""
    mixer = made("hierarchical", 22, 2, block=4, head_dim=6, **options)
    with torch.no_grad():
        mixer.v_proj.weight.zero_()
        mixer.v_proj.bias = nn.Parameter(randn(12))
    want = mixer.o_proj(mixer.v_proj.bias)
    for length in (3, 16, 17, 67, 128):
        y = mixer(randn(1, length, 22))
        torch.testing.assert_close(y, want.expand_as(y), atol=1e-12, rtol=0)


def test_the_causal_form_of_the_paper_would_leak():
    """By its own formula a mean query reads tokens that come after the one it asks for; with fine queries none does."""
    q = randn(1, 37, 2, 6).requires_grad_()
    out = hierarchical(q, randn(1, 37, 2, 6, seed=1), randn(1, 37, 2, 6, seed=2), 2, causal=True, coarse_queries=True)
    assert torch.autograd.grad(out[0, 36 - 4].sum(), q)[0][0, 33:].any()
    with pytest.raises(OptionError, match="later tokens"):
        build("hierarchical", 22, 2, causal=True, coarse_queries=True)
    reads = readers(made("hierarchical", 22, 2, block=2, head_dim=6, causal=True), 37, 22)
    assert reads.equal(torch.ones(37, 37, dtype=torch.bool).tril())


def test_the_hierarchy_keeps_a_logarithm_of_the_tokens():
    """8 entries of every level that is full, each 2 * 12 numbers in fp32."""
    mixer = build("hierarchical", 22, 2, block=4, head_dim=6, causal=True)
    per_level = 8 * 2 * 12 * 4
    assert mixer.cache_bytes(2**20) - mixer.cache_bytes(2**19) == per_level
    assert mixer.cache_bytes(2**20) < 21 * per_level < mixer.cache_bytes(2**10) * 3


def test_hierarchical_decodes_over_many_levels():
    mixer = made("hierarchical", 22, 2, block=2, head_dim=6, causal=True)
    x = randn(2, 331, 22)
    cache = mixer.new_cache(rows=2)
    with torch.no_grad():
        got = torch.cat([mixer(part, cache=cache) for part in x.split([131, 1, 1, 67, *[1] * 131], dim=1)], dim=1)
        torch.testing.assert_close(got, mixer(x), atol=1e-10, rtol=0)


# ---- axial ------------------------------------------------------------------------------------------------------------------


def cells(height: int, width: int) -> tuple[Tensor, Tensor]:
    at = torch.arange(height * width)
    return at // width, at % width


def test_what_axial_attention_reaches():
    row, column = cells(4, 5)
    same_row, same_column = row[:, None] == row, column[:, None] == column
    earlier = torch.ones(20, 20, dtype=torch.bool).tril()
    options = {"shape": (4, 5), "head_dim": 6}
    assert readers(made("axial", 23, 3, combine="sum", **options), 20, 23).equal(same_row | same_column)
    assert readers(made("axial", 23, 3, **options), 20, 23).all()
    masked = readers(made("axial", 23, 3, causal=True, **options), 20, 23)
    assert masked.equal((row <= row[:, None]) & (column <= column[:, None]))
    assert readers(made("axial", 23, 3, causal=True, combine="shifted", **options), 20, 23).equal(earlier)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"combine": "sum"}, {"causal": True, "combine": "shifted"}])
def test_lines_side_by_side_are_the_mask(options: dict[str, Any]):
    """Dense sequences bring the cells of a line together; explicit positions, here the same ones, go through the mask."""
    for shape in ((13, 5), (5, 13), *([] if "shifted" in options.values() else [(3, 4, 5), (7, 2, 3)])):
        mixer = made("axial", 23, 3, head_dim=6, shape=shape, **options)
        for length in (1, 6, 23, 41):
            x = randn(2, length, 23)
            through_mask = mixer(x, seq=SeqInfo((length, length)))
            torch.testing.assert_close(mixer(x), through_mask, atol=1e-12, rtol=0)


def test_a_shift_needs_whole_rows_and_a_grid_its_cells():
    mixer = made("axial", 23, 3, head_dim=6, shape=(4, 5), causal=True, combine="shifted")
    with pytest.raises(UnsupportedError, match="beginning of a row"):
        mixer(randn(1, 3, 23), positions=torch.arange(3) + 2)
    with pytest.raises(ShapeError, match="20 cells"):
        mixer(randn(1, 21, 23))
    for bad in ({"shape": (7,)}, {"shape": (4, 0)}, {"shape": (4, 5), "combine": "shifted"}, {"shape": (4, 5), "combine": "x"}):
        with pytest.raises(OptionError, match="axial"):
            build("axial", 24, 3, **bad)


# ---- memory-compressed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strict", "start"), [(False, "none"), (True, "none"), (False, "first"), (True, "null")])
def test_an_entry_is_seen_when_all_its_tokens_are_past(strict: bool, start: str):
    reads = readers(made("memory-compressed", 22, 2, strict=strict, start=start), 17, 22)
    i, j = torch.arange(17)[:, None], torch.arange(17)
    want = (j // 3 + 1) * 3 - 1 + strict <= i
    if start == "first":
        want |= j == 0
    sees = want.any(1, keepdim=True) if start != "null" else torch.ones(17, 1, dtype=torch.bool)
    several = want.reshape(17, 17).sum(1, keepdim=True) > (3 if start == "none" else 1)  # one entry: its weight is 1
    assert reads.equal(want | (sees & several & (i == j)) | ((i == j) & (start == "null") & want.any(1, keepdim=True)))


def test_local_and_compressed_layers_decode_together():
    """Local, compressed, local, compressed, local: the stack of the paper."""
    names = ["local", "memory-compressed"] * 2 + ["local"]
    layers = [made(name, 24, 2, **({"block": 7} if name == "local" else {})) for name in names]
    x = randn(1, 31, 24)

    def run(x: Tensor, caches: list[Any]) -> Tensor:
        for layer, cache in zip(layers, caches, strict=True):
            x = x + layer(x, cache=cache)
        return x

    caches = [layer.new_cache() for layer in layers]
    got = torch.cat([run(part, caches) for part in x.split([4, 1, 1, 9, *[1] * 16], dim=1)], dim=1)
    torch.testing.assert_close(got, run(x, [None] * 5), atol=1e-12, rtol=0)


# ---- synthesizer ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", ["dense", "factorised-dense", "random", "factorised-random", "fixed-random"])
def test_synthetic_weights_do_not_look_at_the_other_tokens(kinds: str):
    """Outputs are linear in the values of other tokens: only v is read from them."""
    mixer = made("synthesizer", 22, 2, max_len=13, kinds=kinds)
    x, step = randn(1, 13, 22), randn(1, 13, 22, seed=3)
    step[:, 4] = 0
    y = [mixer(x + a * step)[:, 4] for a in (0.0, 1.0, 2.0)]
    torch.testing.assert_close(y[2] - y[1], y[1] - y[0], atol=1e-12, rtol=0)
    assert (y[1] - y[0]).abs().max() > 1e-3


def test_options_that_no_kind_reads_are_refused():
    for bad in (
        {"kinds": "random", "hidden": 5},
        {"rank": 3},
        {"kinds": ("dense", "dense")},
        {"kinds": "sparse"},
        {"kinds": ()},
        {"scale": 1.0},
        {"combine": "sum"},
        {"combine": "max"},
    ):
        with pytest.raises(OptionError, match="synthesizer"):
            build("synthesizer", 22, 2, max_len=13, **bad)
    with pytest.raises(ShapeError, match="13 positions"):
        build("synthesizer", 22, 2, max_len=13)(torch.zeros(1, 14, 22))


def test_positions_pick_the_learned_scores():
    mixer = made("synthesizer", 22, 2, max_len=43, kinds=("random", "dense"), causal=True)
    x = randn(2, 43, 22)
    where = torch.tensor([3, 40, 7, 21, 22])
    whole = mixer(x[:, where], positions=where)
    order = where.argsort()
    torch.testing.assert_close(mixer(x[:, where[order]], positions=where[order]), whole[:, order], atol=1e-12, rtol=0)
    got = mixer(x[:, 5:12], positions=torch.arange(5, 12))
    assert not torch.allclose(got, mixer(x[:, 5:12]))


# ---- lambda -----------------------------------------------------------------------------------------------------------------


def test_running_softmax_stands_large_keys():
    """Keys that rise and fall by thousands: every weight is still a share of the running sum."""
    mixer = made("lambda", 22, 2, dim_k=3, causal=True)
    with torch.no_grad():
        mixer.k_proj.weight.mul_(3000)
        mixer.E.zero_()
    x = randn(1, 89, 22)
    torch.testing.assert_close(mixer(x), build_reference(mixer)(x), atol=1e-10, rtol=0)
    y = mixer.float()(x.float())
    assert y.isfinite().all()


def build_reference(mixer: Any) -> Any:
    import copy

    return copy.deepcopy(mixer).use("reference")


def test_batch_norm_counts_tokens_not_padding():
    mixer = made("lambda", 22, 2, dim_k=3, scope=5).train()
    lengths, x = (5, 3, 11), randn(19, 22)
    padded = torch.zeros(3, 13, 22, dtype=torch.float64)
    for row, piece in zip(padded, x.split(lengths), strict=True):
        row[: len(piece)] = piece
    mixer(x, seq=SeqInfo(lengths))
    first = mixer.v_norm.running_mean.clone()
    torch.testing.assert_close(first, 0.1 * mixer.v_proj(x).mean(0), atol=1e-12, rtol=0)
    mixer.v_norm.reset_running_stats()
    mixer(padded, seq=SeqInfo(lengths))
    torch.testing.assert_close(mixer.v_norm.running_mean, first, atol=1e-12, rtol=0)


def test_an_even_scope_has_no_middle():
    with pytest.raises(OptionError, match="odd unless causal"):
        build("lambda", 22, 2, scope=4)
    with pytest.raises(UnsupportedError, match="only the causal form"):
        made("lambda", 22, 2).use("blocked")(randn(1, 3, 22))
