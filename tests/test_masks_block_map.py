"""Block maps: their layout, what they share, how they are made from chosen blocks, and the cache of compiled ones."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from attlas.errors import AttlasError, OptionError, ShapeError
from attlas.masks import (
    All,
    Axis,
    BlockMap,
    Blocks,
    Causal,
    Dense,
    Dilated,
    Documents,
    Fixed,
    Global,
    Grid,
    Local,
    Mask,
    Nothing,
    Padding,
    PerHead,
    Prefix,
    Random,
    Segment,
    Sinks,
    Strided,
    Window,
    bits,
    compile,
)
from attlas.masks.compile import compile_mask
from attlas.masks.lru import BoundedCache
from attlas.masks.tiles import Code
from attlas.shapes import SeqInfo


def test_layout_is_the_written_one() -> None:
    """Two blocks of queries by two blocks of keys, read off by hand."""
    found = (Causal() & Window.last(9)).block_map((11, 13), block_q=8, block_k=8)
    assert (found.q_len, found.k_len, found.block_q, found.block_k, found.batch, found.heads) == (11, 13, 8, 8, 1, 1)
    assert (found.nq, found.nk, found.nnz) == (2, 2, 4)
    assert found.row_ptr.tolist() == [0, 2, 4] and found.row_ptr.dtype == torch.int64
    assert found.cols.tolist() == [0, 1, 0, 1] and found.cols.dtype == torch.int32
    assert found.tile_ids.dtype == torch.int32 and found.tiles.dtype == torch.uint8
    assert found.tiles.shape == (len(found.tiles), 8, 1)
    cols, ids = found.row(0, 0, 0)
    assert cols.tolist() == [0, 1]
    # Queries 2 ... 9: keys 0 ... min(q, 7) in the first block, so query 2 has bits 0, 1, 2.
    assert found.tiles[ids[0], :, 0].tolist() == [0b111, 0b1111, 0b11111, 0b111111, 0b1111111, 255, 255, 0b11111110]
    assert found.tiles[ids[1], :, 0].tolist() == [0, 0, 0, 0, 0, 0, 1, 3]
    assert found.tile(int(ids[1])).tolist()[7] == [True, True] + [False] * 6
    assert bool(found.tile(-1).all()) and found.tile(-1).shape == (8, 8)
    assert "4 blocks touched" in repr(found)
    assert found.nbytes == 3 * 8 + 4 * 4 + 4 * 4 + found.tiles.numel()


@pytest.mark.parametrize(
    ("mask", "tiles"),
    [
        (Causal(), 1),
        (Causal() & Window.last(4096), 2),
        (Causal() & Window.last(1000), 3),
        (Window(1000, 500), 4),
        (Causal() & Window.last(1024) | Sinks(4), 4),
        (Causal() & Strided(128), 1),
        (Causal() & Fixed(64, 8), 2),
        (Causal() & Local(256), 1),
        (Local(256), 0),
        (Causal() | Prefix(1000), 3),
        (Window(512, 512) | Global(range(64)), 6),
        (Dilated(256, 256, 2), 3),
        (~Causal(), 1),
    ],
    ids=repr,
)
@pytest.mark.parametrize("tokens", [8192, 32768, 65536])
def test_tiles_do_not_grow_with_the_sequence(mask: Mask, tiles: int, tokens: int) -> None:
    assert len(mask.block_map((tokens, tokens)).tiles) == tiles


def test_evaluation_is_shared_between_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many partial blocks there are, only different ones are written out pair by pair."""
    evaluated = []
    original = Window.evaluate
    monkeypatch.setattr(Window, "evaluate", lambda self, pairs: evaluated.append(pairs.q.shape[0]) or original(self, pairs))
    seq = SeqInfo((5000, 3001, 7007))
    for grid, most in ((Grid.dense(65536, 65536), 3), (Grid.packed(seq), 40), (Grid.dense(60001, 65536), 8)):
        evaluated.clear()
        found = compile_mask(Window.last(777), grid, 128, 128)
        assert found.nnz > 100 and 0 < sum(evaluated) <= most


def test_empty_grids() -> None:
    for Tq, Tk in ((0, 0), (0, 7), (7, 0)):
        for mask in (Causal(), PerHead((All(), Causal())), Padding([3, 4, 5]), Causal("start"), Random(1, 2, 3)):
            found = mask.block_map((Tq, Tk), block_q=8, block_k=8)
            lead = (mask.batch or 1) * (mask.heads or 1)
            assert found.nnz == 0 and len(found.tiles) == 0 and found.row_ptr.tolist() == [0] * (lead * found.nq + 1)
            assert found.to_dense().shape == (mask.batch or 1, mask.heads or 1, Tq, Tk)
            assert found.count() == mask.count((Tq, Tk)) == 0 and found.density() == 0.0
            assert len(found.transpose().row_ptr) == lead * found.nk + 1
    assert Nothing().block_map((19, 23)).nnz == 0 and All().block_map((19, 23)).tile_ids.tolist() == [-1]


def test_maps_that_differ_by_row_and_head_share_tiles() -> None:
    mask = PerHead((Causal(), Causal() & Window.last(40), Causal())) & Padding([64, 50])
    found = mask.block_map((64, 64), block_q=16, block_k=16)
    assert (found.batch, found.heads) == (2, 3)
    assert torch.equal(found.to_dense(), mask.to_bool(64, 64))
    for b, h, i in itertools.product(range(2), range(3), range(4)):
        cols, ids = found.row(b, h, i)
        one = mask.at(b, h).block_map((64, 64), block_q=16, block_k=16)
        assert cols.tolist() == one.row(0, 0, i)[0].tolist()
        for mine, theirs in zip(ids.tolist(), one.row(0, 0, i)[1].tolist(), strict=True):
            assert torch.equal(found.tile(mine), one.tile(theirs))
    assert one.row(5, 7, 1)[0].tolist() == one.row(0, 0, 1)[0].tolist()  # a map that does not differ serves every row and head


def test_transpose_lists_the_same_blocks_by_keys() -> None:
    mask = PerHead((Causal() & Window.last(37), Global([3, 90]))) & Padding([101, 60, 0])
    found = mask.block_map((83, 101), block_q=16, block_k=8)
    turned = found.transpose()
    assert found.transpose() is turned and turned.tiles is found.tiles
    assert (turned.nq, turned.nk) == (found.nq, found.nk) == (6, 13)
    for b, h in itertools.product(range(3), range(2)):
        forward = {(i, c, t) for i in range(6) for c, t in zip(*(x.tolist() for x in found.row(b, h, i)), strict=True)}
        rows = [turned.row(b, h, j) for j in range(13)]
        assert forward == {(i, j, t) for j, r in enumerate(rows) for i, t in zip(*(x.tolist() for x in r), strict=True)}
        assert all(r[0].tolist() == sorted(r[0].tolist()) for r in rows)
    assert found.nbytes > found.tiles.numel() + turned.row_ptr.numel() * 8


CHOSEN = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1]], dtype=torch.bool)


@pytest.mark.parametrize(
    "blocks",
    [
        CHOSEN,
        torch.tensor([[3, 0, -1], [-1, -1, -1], [1, 0, 3]]),
        torch.tensor([[0, 3, 3], [-5, -1, -1], [3, 1, 0]], dtype=torch.int32),
        [[0, 3], [], [3, 1, 0, 1]],
        CHOSEN.tolist(),
        CHOSEN[None, None],
    ],
    ids=["bool", "indices", "int32", "ragged", "bools", "4-D"],
)
def test_chosen_blocks(blocks: Any) -> None:
    Tq, Tk = 21, 29
    wanted = CHOSEN.repeat_interleave(8, 0).repeat_interleave(8, 1)[:Tq, :Tk]
    found = BlockMap.from_blocks(blocks, Tq, Tk, block_q=8, block_k=8)
    assert torch.equal(found.to_dense()[0, 0], wanted) and found.tile_ids.tolist() == [-1] * 5 and len(found.tiles) == 0
    assert found.count() == int(wanted.sum())
    causal = BlockMap.from_blocks(blocks, Tq, Tk, block_q=8, block_k=8, mask=Causal())
    assert torch.equal(causal.to_dense()[0, 0], wanted & Causal().to_bool(Tq, Tk))
    late = Grid.at(range(100, 100 + Tq), range(Tk))
    assert torch.equal(
        BlockMap.from_blocks(blocks, Tq, Tk, block_q=8, block_k=8, mask=Causal(), grid=late).to_dense()[0, 0], wanted
    )


def test_blocks_chosen_by_row_and_head() -> None:
    chosen = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    wide = chosen.repeat_interleave(8, 2).repeat_interleave(16, 3)[..., :31, :71]
    assert torch.equal(BlockMap.from_blocks(chosen, 31, 71, block_q=8, block_k=16).to_dense(), wide)
    assert torch.equal(BlockMap.from_blocks(chosen[0], 31, 71, block_q=8, block_k=16).to_dense(), wide[:1])
    for mask in (Causal(), Causal() & Padding([50, 71]), PerHead((All(), Causal(), Nothing())) | Prefix((3, 20))):
        found = BlockMap.from_blocks(chosen, 31, 71, block_q=8, block_k=16, mask=mask)
        assert torch.equal(found.to_dense(), wide & mask.to_bool(31, 71))
        one = BlockMap.from_blocks(chosen[0, 0], 31, 71, block_q=8, block_k=16, mask=mask)
        assert torch.equal(one.to_dense(), (wide[0, 0] & mask.to_bool(31, 71)).expand_as(one.to_dense()))
    grid = Grid.packed(SeqInfo((13, 18), (30, 41)))
    inside = All().dense(grid)
    assert torch.equal(BlockMap.from_blocks(chosen, 31, 71, block_q=8, block_k=16, grid=grid).to_dense(), wide & inside)


def test_chosen_blocks_that_do_not_fit() -> None:
    with pytest.raises(ShapeError, match=r"block 9 of only 4"):
        BlockMap.from_blocks([[9], [0], [1]], 21, 29, block_q=8, block_k=8)
    with pytest.raises(ShapeError, match=r"nq=3"):
        BlockMap.from_blocks([[0], [1]], 21, 29, block_q=8, block_k=8)
    with pytest.raises(ShapeError, match=r"4 blocks of keys"):
        BlockMap.from_blocks(CHOSEN[:, :3], 21, 29, block_q=8, block_k=8)
    with pytest.raises(OptionError, match=r"block_k=9"):
        BlockMap.from_blocks(CHOSEN, 21, 29, block_q=8, block_k=9)
    with pytest.raises(ShapeError, match=r"needs 1 batch rows and 2 heads"):
        BlockMap.from_blocks(CHOSEN.expand(3, 3, 4), 21, 29, block_q=8, block_k=8, mask=PerHead((All(), All())))
    with pytest.raises(ShapeError, match=r"the grid has"):
        BlockMap.from_blocks(CHOSEN, 21, 29, block_q=8, block_k=8, grid=Grid.dense(3, 3))


@pytest.mark.parametrize(
    "mask",
    [
        Causal() & Window.last(300) | Sinks(3),
        Causal() & Documents([500, 1, 0, 1300, 77]),
        Window(20, 20) | Global([0, 700, 701]) | Random(2, 32, 5, span=60),
        Causal() & (Strided(37) | Window.last(37)),
        Causal() & ~Local(100),
        Blocks(torch.rand(11, 13, generator=torch.Generator().manual_seed(1)) < 0.3, 150),
        Dense(torch.rand(2500, 2600, generator=torch.Generator().manual_seed(1)) < 0.001),
    ],
    ids=lambda m: type(m).__name__ if isinstance(m, Dense | Blocks) else repr(m),
)
@pytest.mark.parametrize(
    "grid", [Grid.dense(1901, 2003), Grid.at(range(1500, 1601), [*range(1401, 1601), *range(1201, 1401)])], ids=["dense", "ring"]
)
def test_usual_sizes(mask: Mask, grid: Grid) -> None:
    """The block sizes that kernels use, at lengths where several levels are descended."""
    truth = mask.dense(grid)
    for block_q, block_k in ((128, 128), (64, 32)):
        found = compile_mask(mask, grid, block_q, block_k)
        assert torch.equal(found.to_dense()[0, 0], truth)
        assert found.count() == int(truth.sum()) == mask.count(grid)


def test_count_needs_no_map() -> None:
    T = 1 << 22  # the map of this causal mask would have half a billion entries
    assert Causal().count((T, T)) == T * (T + 1) // 2
    assert (Causal() & Window.last(4096)).count((T, T)) == 4096 * T - 4096 * 4095 // 2
    assert (PerHead((Causal(), Causal(), All())) & Prefix(T)).count((T, T)) == T * (T + 1) + T * T


def test_packing_of_bits() -> None:
    given = torch.rand(3, 5, 40, generator=torch.Generator().manual_seed(2)) < 0.5
    packed = bits.pack(given)
    assert packed.shape == (3, 5, 5) and packed.dtype == torch.uint8
    assert packed[1, 2].tolist() == [sum(int(given[1, 2, 8 * i + j]) << j for j in range(8)) for i in range(5)]
    assert torch.equal(bits.unpack(packed), given)
    assert bits.popcount(packed).tolist() == given.sum((1, 2)).tolist()


def test_tiles_with_one_fingerprint_are_still_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = torch.randint(0, 3, (40, 1, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    for _ in range(2):
        distinct, same = bits.deduplicate(tiles)
        assert torch.equal(distinct[same], tiles) and len(distinct) == len({tuple(t.flatten().tolist()) for t in tiles})
        assert same[0] == 0 and all(int(x) <= int(same[:i].max()) + 1 for i, x in enumerate(same) if i)
        monkeypatch.setattr(bits, "_fingerprint", lambda t: torch.zeros(len(t), dtype=torch.int64))


def test_codes_are_exact_however_wide_the_columns() -> None:
    generator = torch.Generator().manual_seed(4)
    columns = [
        torch.randint(-(2**span), 2**span, (7,), generator=generator)[torch.randint(0, 7, (500,), generator=generator)]
        for span in (3, 62, 40, 30, 35, 61)
    ]
    code = Code(500)
    for column in columns:
        code.add(column)
    rows = list(zip(*(c.tolist() for c in columns), strict=True))
    assert len(set(rows)) > 400 and len(set(zip(rows, code.value.tolist(), strict=True))) == len(set(rows)) == len(
        set(code.value.tolist())
    )
    assert int(code.value.min()) >= 0 and int(code.value.max()) < code.size


def test_compiled_maps_are_kept() -> None:
    mask = Causal() & Window.last(771)
    first = mask.block_map((1009, 1013))
    assert (Window.last(771) & Causal()).block_map(Grid.dense(1009, 1013)) is first
    assert mask.block_map((1009, 1013), block_q=64) is not first and mask.block_map((1009, 1014)) is not first
    assert mask.block_map((1009, 1013), device="cpu") is not None
    compile.CACHE.clear()
    assert mask.block_map((1009, 1013)) is not first


def test_maps_compiled_without_autograd_serve_training() -> None:
    """A map made first under inference_mode is kept, and a training step that saves it for backward comes later."""
    mask = Causal() & Documents([100, 31]) | Global([7, 50])
    with torch.inference_mode():
        found = mask.block_map((131, 131), block_q=16, block_k=16)
        turned = found.transpose()
    tensors = (found.row_ptr, found.cols, found.tile_ids, found.tiles, turned.row_ptr, turned.cols, turned.tile_ids, found.rows)
    assert not any(t.is_inference() for t in tensors[:-1])
    assert torch.equal(mask.block_map((131, 131), block_q=16, block_k=16).to_dense()[0, 0], mask.to_bool(131, 131))


def test_the_default_device_does_not_matter() -> None:
    masks = [Causal() & Documents([100, 31]), Global([7, 50]) | Random(2, 8, 3), Blocks(["01", "10"], 70), Padding([3, 131])]
    with torch.device("meta"):
        maps = [mask.block_map(Grid.dense(131, 139)) for mask in masks]
        ring = Causal().block_map(Grid.at([9], [8, 9, 5, 6, 7]), block_k=8)
        spans = [mask.key_span(10, 12) for mask in masks]
    for mask, found, span in zip(masks, maps, spans, strict=True):
        assert torch.equal(found.to_dense().squeeze(), mask.to_bool(131, 139).squeeze()) and span == mask.key_span(10, 12)
    assert ring.count() == 5


def test_masks_of_a_call_are_forgotten_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of given tensors keep them alive, so they have a smaller cache of their own."""
    held = BoundedCache(max_items=100, max_bytes=30_000)
    monkeypatch.setattr(compile, "HELD", held)
    before = len(compile.CACHE)
    tensor = torch.ones(100, 100, dtype=torch.bool)
    mask = Causal() & Dense(tensor)
    first = mask.block_map((100, 100))
    assert (Causal() & Dense(tensor)).block_map((100, 100)) is first
    for _ in range(5):
        Dense(tensor.clone()).block_map((100, 100))
    assert len(held) <= 3 and held.nbytes <= 30_000 and len(compile.CACHE) == before
    tensor[0, 0] = False
    with pytest.raises(AttlasError, match="changed in place"):
        mask.block_map((100, 100))


class Thing:
    def __init__(self, nbytes: int):
        self.nbytes = nbytes


def test_cache_is_bounded_by_number_and_bytes() -> None:
    cache = BoundedCache(max_items=3, max_bytes=100)
    for name in "abc":
        cache.put(name, Thing(10))
    assert cache.get("a") is not None  # used: "b" is now the oldest
    cache.put("d", Thing(10))
    assert cache.get("b") is None and cache.get("a") is not None and len(cache) == 3 and cache.nbytes == 30
    cache.put("e", Thing(60), held=25)
    assert len(cache) == 2 and cache.nbytes == 95 and cache.get("a") is not None
    cache.put("huge", Thing(1000))
    assert len(cache) == 1 and cache.get("huge") is not None  # the newest stays, or layers that share it would compile it each
    cache.put("f", Thing(1))
    assert cache.get("huge") is None and cache.nbytes == 1


def test_huge_maps_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = BoundedCache(max_items=100, max_bytes=5_000_000)
    monkeypatch.setattr(compile, "CACHE", cache)
    for n in range(7):
        assert Causal().block_map((6007 + n, 6007), block_q=8, block_k=8).nbytes > 2_000_000
        assert cache.nbytes <= 5_000_000 and len(cache) <= 2
    assert len(cache) == 2


def test_segments_of_one_sequence_in_any_order() -> None:
    q = [Segment(5, 40, 1), Segment(7, 3, 0), Segment(2, 45, 1)]
    k = [Segment(9, 36, 1), Segment(20, 0, 0), Segment(3, 45, 1)]
    grid = Grid(Axis(tuple(q)), Axis(tuple(k)))
    for mask in (Causal(), Window(3, 1), Strided(2), All()):
        assert torch.equal(mask.block_map(grid, block_q=4, block_k=8).to_dense()[0, 0], mask.dense(grid))
