"""Expressions as values: equality, hashing, printing, laws of the algebra, and refusals that restate the call."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch

import attlas.masks
from attlas.errors import AttlasError, OptionError, ShapeError
from attlas.masks import (
    All,
    Axis,
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
)
from attlas.shapes import SeqInfo

LEAVES: list[Mask] = [
    Causal(),
    Causal("start"),
    Window(3, None),
    Window.last(5),
    Prefix(3),
    Prefix((3, 5)),
    Sinks(2),
    Documents([3, 5]),
    Padding([7, 3]),
    Global([5, 1]),
    Strided(3),
    Fixed(5, 2),
    Dilated(3, 0, 2),
    Blocks(["10", "11"], 3),
    Blocks([["10", "11"], ["01", "11"], ["11", "00"]], 3),
    Random(2, 3, 11),
    Random(2, 3, 11, span=4),
    Local(7),
    All(),
    Nothing(),
    PerHead((Causal(), Window(1, 1) & Prefix(5), ~Local(2))),
]
NAMES = {name: getattr(attlas.masks, name) for name in attlas.masks.__all__}


def again(mask: Mask) -> Mask:
    return eval(repr(mask), dict(NAMES))


@pytest.mark.parametrize("mask", LEAVES, ids=repr)
def test_repr_makes_an_equal_mask(mask: Mask) -> None:
    for m in (mask, ~mask, mask & Strided(2), ~mask | Window(1, 0) & Sinks(5), ~(mask & Local(3)) | Prefix(1)):
        made = again(m)
        assert made == m and hash(made) == hash(m) and repr(made) == repr(m)
        assert torch.equal(made.to_bool(7, 11), m.to_bool(7, 11))


def test_different_masks_differ() -> None:
    for a, b in itertools.combinations(LEAVES, 2):
        assert a != b and again(a) != b and ~b != b and (~a != b or {a, b} == {All(), Nothing()})
    assert Causal() != "Causal()" and Global([1, 5, 5]) == Global((5, 1)) and Documents((3, 5)) == Documents(torch.tensor([3, 5]))
    assert Blocks(torch.tensor([[True, False], [True, True]]), 3) == Blocks([[1, 0], [True, True]], 3) == Blocks(["10", "11"], 3)


@pytest.mark.parametrize(("a", "b"), [(Causal(), Window(5, 2)), (Global([2]), Documents([3, 4])), (Sinks(2), ~Prefix(4))])
def test_laws_of_the_algebra(a: Mask, b: Mask) -> None:
    c = Strided(3)
    assert a & b == b & a and hash(a & b) == hash(b & a) and a | b == b | a and repr(a | b) == repr(b | a)
    assert (a & b) & c == a & (b & c) == (c & a) & (b & a) and (a | b) | c == a | (c | b)
    assert a & a == a and a | a == a and ~~a == a and ~~(a & b | c) == a & b | c
    assert ~(a & b) == ~a | ~b and ~(a | b) == ~a & ~b
    assert a & All() == a and a | Nothing() == a and a & Nothing() == Nothing() and a | All() == All() and ~All() == Nothing()
    for left, right in ((a & b, b & a), (~(a & b), ~a | ~b), (a & (b | c), (a & b) | (a & c))):
        assert torch.equal(left.to_bool(17, 19), right.to_bool(17, 19))
    assert torch.equal((a & b).to_bool(17, 19), a.to_bool(17, 19) & b.to_bool(17, 19))
    assert torch.equal((a | ~b).to_bool(17, 19), a.to_bool(17, 19) | ~b.to_bool(17, 19))
    assert not bool((a & ~a).to_bool(17, 19).any()) and (a & ~a).count((17, 19)) == 0


def test_masks_are_keys_and_travel() -> None:
    mask = Causal() & Window.last(5) | Blocks(["10", "11"], 3) & ~Documents([3, 5])
    assert {mask: 1}[again(mask)] == 1
    assert copy.deepcopy(mask) is mask and copy.copy(mask) is mask
    back = pickle.loads(pickle.dumps(mask))
    assert back == mask and hash(back) == hash(mask) and back.count((23, 23)) == mask.count((23, 23))
    assert set(mask.__getstate__()) == {"operands"}  # hashes of strings differ between processes, so none may travel


def test_dense_masks_are_their_tensor() -> None:
    tensor = torch.ones(5, 7, dtype=torch.bool)
    assert Dense(tensor) == Dense(tensor) and Dense(tensor) != Dense(tensor.clone())
    mask = Dense(tensor)
    assert mask.count((5, 7)) == 35
    tensor[0] = False
    with pytest.raises(AttlasError, match="changed in place"):
        mask.to_bool(5, 7)
    assert Dense(tensor).count((5, 7)) == 28
    back = pickle.loads(pickle.dumps(Dense(tensor)))
    assert torch.equal(back.to_bool(5, 7), tensor)


def test_tensors_given_to_blocks_are_copied() -> None:
    allowed = torch.eye(3, dtype=torch.bool)
    mask = Blocks(allowed, 2)
    allowed.zero_()
    assert mask.count((6, 6)) == 12


def test_sizes_that_masks_need() -> None:
    assert (Causal().batch, Causal().heads) == (None, None)
    both = Padding([3, 5]) & PerHead((Causal(), All(), Nothing()))
    assert (both.batch, both.heads) == (2, 3) and ((~both).batch, (~both).heads) == (2, 3)
    assert both.dense((5, 5), batch=2, heads=3).shape == (2, 3, 5, 5)
    assert Causal().dense((5, 5), batch=2, heads=3).shape == (5, 5)


@pytest.mark.parametrize(
    ("mask", "q", "wanted"),
    [
        (Causal() & Window.last(4), (10, 12), (7, 12)),
        (Causal() & Window.last(4) | Sinks(2), (10, 12), (None, 12)),
        (~Causal(), (10, 12), (11, None)),
        (~Window(3, None), (10, 12), (None, 8)),
        (~Window(None, 3), (10, 12), (14, None)),
        (~Window(None, None), (10, 12), None),
        (~Window(3, 0), (10, 12), (None, None)),
        (Dilated(2, 1, 5), (10, 12), (0, 17)),
        (Local(5), (11, 13), (10, 14)),
        (Fixed(5, 0), (11, 13), (10, 14)),
        (Documents([4, 5, 6]), (3, 5), (None, 8)),
        (Documents([4, 5, 6]), (5, 5), (4, 8)),
        (Documents([4, 5, 6]), (99, 99), (15, None)),
        (Global([3, 9]), (4, 8), (3, 9)),
        (Global([3, 9]), (4, 9), (None, None)),
        (Global([]), (4, 9), None),
        (Blocks(["010", "000", "101"], 4), (0, 3), (4, 7)),
        (Blocks(["010", "000", "101"], 4), (4, 7), None),
        (Blocks(["010", "000", "101"], 4), (0, 11), (0, 11)),
        (Prefix((3, 8)), (0, 1), (None, 7)),
        (~Padding([3, 8]), (0, 1), (3, None)),
        (PerHead((Window.last(3), Window.last(5))), (10, 10), (6, 10)),
        (~PerHead((All(), All())), (10, 10), None),
        (Nothing(), (0, 5), None),
        (Causal() & ~Window(3, None) & ~Prefix(20), (10, 12), None),
    ],
    ids=repr,
)
def test_key_spans(mask: Mask, q: tuple[int, int], wanted: tuple[int | None, int | None] | None) -> None:
    assert mask.key_span(*q) == wanted


REFUSED: list[tuple[Callable[[], object], type[AttlasError], str]] = [
    (lambda: Causal("top"), OptionError, "Causal(align='top')"),
    (lambda: Window(-3, 0), OptionError, "Window(left=-3, right=0): left"),
    (lambda: Window(3, -1), OptionError, "right must be at least 0"),
    (lambda: Window(3.0, 0), OptionError, "left must be an integer, not 3.0"),
    (lambda: Window(True, 0), OptionError, "integer"),
    (lambda: Window.last(0), OptionError, "Window.last(0)"),
    (lambda: Window.last(None), OptionError, "Window.last(None)"),
    (lambda: Prefix(-1), OptionError, "Prefix(-1)"),
    (lambda: Prefix("5"), OptionError, "Prefix('5')"),
    (lambda: Prefix(()), OptionError, "Prefix(())"),
    (lambda: Prefix((3, -2)), OptionError, "at least 0, not -2"),
    (lambda: Sinks(-1), OptionError, "Sinks(-1)"),
    (lambda: Documents([3, -1]), OptionError, "Documents([3, -1])"),
    (lambda: Documents(7), OptionError, "sequence of integers, not 7"),
    (lambda: Padding([]), OptionError, "one length per batch row"),
    (lambda: Padding([3, 2.5]), OptionError, "2.5"),
    (lambda: Global([-1]), OptionError, "Global([-1])"),
    (lambda: Global(range(3, -3, -1)), OptionError, "at least 0, not -2"),
    (lambda: Global("12"), OptionError, "'12'"),
    (lambda: Strided(0), OptionError, "Strided(0)"),
    (lambda: Fixed(0, 0), OptionError, "block must be at least 1"),
    (lambda: Fixed(4, 5), OptionError, "summary must be at most block"),
    (lambda: Dilated(1, 1, 0), OptionError, "dilation"),
    (lambda: Local(-2), OptionError, "Local(-2)"),
    (lambda: Blocks(torch.ones(3, dtype=torch.bool), 4), OptionError, "[nq_blocks, nk_blocks]"),
    (lambda: Blocks(torch.ones(1, 1, 3, 3, dtype=torch.bool), 4), OptionError, "[1, 1, 3, 3]"),
    (lambda: Blocks(torch.ones(3, 3), 4), OptionError, "bool, not torch.float32"),
    (lambda: Blocks([[True], [True, False]], 4), OptionError, "not a matrix"),
    (lambda: Blocks(["12"], 4), OptionError, "0 and 1"),
    (lambda: Blocks([[2]], 4), OptionError, "2 is neither True nor False"),
    (lambda: Blocks(torch.ones(0, 3, dtype=torch.bool), 4), OptionError, "at least one block"),
    (lambda: Blocks(["1"], 0), OptionError, "block_size"),
    (lambda: Random(5, 4, 0, span=3), OptionError, "cannot draw 5 distinct blocks from the 3 blocks"),
    (lambda: Random(0, 4, 0), OptionError, "num_blocks"),
    (lambda: Random(1, 4, 0.5), OptionError, "seed"),
    (lambda: Dense(torch.ones(5, 5)), OptionError, "torch.float32 [5, 5]"),
    (lambda: Dense([[True]]), OptionError, "Dense([[True]])"),
    (lambda: Dense(torch.ones(5, dtype=torch.bool)), OptionError, "[5]"),
    (lambda: PerHead(()), OptionError, "one mask for each head"),
    (lambda: PerHead((Causal(), 3)), OptionError, "3"),
    (lambda: PerHead((Causal(), PerHead((All(),)))), ShapeError, "differs by head itself"),
    (lambda: PerHead((Padding([1]), Padding([1, 2]))), ShapeError, "different batch sizes: [1, 2]"),
    (lambda: PerHead((All(), All())) & Blocks([["1"]] * 3, 2), ShapeError, "numbers of heads: [2, 3]"),
    (lambda: Padding([3, 4]) | Prefix((1, 2, 3)), ShapeError, "numbers of batch rows: [2, 3]"),
    (lambda: Padding([3, 4]).dense((5, 5), batch=3), ShapeError, "2 batch rows, the call has 3"),
    (lambda: PerHead((All(), All())).dense((5, 5), heads=4), ShapeError, "2 heads, the call has 4"),
    (lambda: Padding([3, 4]).dense(Grid.packed(SeqInfo((3, 2)))), ShapeError, "no batch dimension"),
    (lambda: Prefix((3, 4)).block_map(Grid.packed(SeqInfo((3, 2)))), ShapeError, "no batch dimension"),
    (
        lambda: Dense(torch.ones(5, 7, dtype=torch.bool)).dense(Grid.at([3], range(8))),
        ShapeError,
        "key positions 0 ... 6; asked about 0 ... 7",
    ),
    (lambda: Dense(torch.ones(5, 7, dtype=torch.bool)).block_map((6, 7)), ShapeError, "query positions 2 ... 6"),
    (lambda: Causal().block_map((5, 5), block_k=12), OptionError, "block_k=12"),
    (lambda: Causal().block_map((5, 5), block_q=0), OptionError, "block_q=0"),
    (lambda: Causal().block_map(5), ShapeError, "wanted a Grid or (Tq, Tk), got 5"),
    (lambda: Causal().to_bool(-1, 3), ShapeError, "Grid.dense(-1, 3)"),
    (lambda: Segment(-1, 0), ShapeError, "length must not be negative"),
    (lambda: Axis.of(torch.zeros(2, 2, dtype=torch.int64)), ShapeError, "[2, 2]"),
    (lambda: Axis.of(torch.zeros(2)), ShapeError, "float32"),
    (lambda: bool(Causal()), OptionError, "&"),
]


@pytest.mark.parametrize(("call", "error", "says"), REFUSED, ids=[says for *_, says in REFUSED])
def test_refusals_restate_the_call(call: Callable[[], object], error: type[AttlasError], says: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert says in str(caught.value)


def test_operators_refuse_what_is_not_a_mask() -> None:
    for other in (True, torch.ones(2, 2, dtype=torch.bool), None):
        with pytest.raises(TypeError):
            _ = Causal() & other  # type: ignore[operator]
