"""What is peculiar to lookahead keys: three forms of one function, memory that grows with the sequence alone, and a cache that
every token rewrites."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attlas.cache.layer import make_cache
from attlas.cache.lookahead import LookaheadPart
from attlas.cache.part import CacheError, PartSpec
from attlas.catalogue.index import build
from attlas.errors import OptionError, ShapeError, UnknownNameError, UnsupportedError
from attlas.kernels.blocked import lookahead as kernel
from attlas.ops.lookahead import lookahead_attention
from attlas.reference.lookahead import castle_parallel, castle_recurrent
from attlas.shapes import SeqInfo
from attlas.testing.budget import assert_same
from attlas.testing.inputs import randn
from attlas.testing.subject import seeded

B, H, D = 2, 3, 5
SIZES = [(1, None), (7, None), (7, 1), (7, 3), (67, None), (67, 2), (131, 71), (131, 64), (131, 1000)]


def six(length: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    made = [randn(B, length, H, D, seed=seed + i, dtype=dtype) for i in range(6)]
    return tuple(made[:3]), tuple(made[3:])


def mixer(window: int | None = None, **options: Any) -> Any:
    name, given = ("castle", {}) if window is None else ("castle-swl", {"window": window})
    return seeded(build(name, 23, H, head_dim=4, **given, **options), torch.float64)


# ---- one function, three forms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "window"), SIZES)
def test_parallel_recurrent_and_blocked_forms_are_one(length: int, window: int | None) -> None:
    ahead, own = six(length)
    want, gathered = castle_recurrent(ahead, own, window)
    assert_same(castle_parallel(ahead, own, window), want, "parallel against recurrent", tol=1e-12)
    got, u = lookahead_attention(ahead, own, window=window)
    assert_same(got, want, "blocked against recurrent", tol=1e-12)
    assert_same(u, gathered, "lookahead keys", tol=1e-12)
    assert not u[:, -1].any(), "the last token has gathered something"


def test_three_tokens_by_hand() -> None:
    ahead, own = ([randn(1, 3, 1, 1, seed=s) for s in seeds] for seeds in ((1, 2, 3), (4, 5, 6)))
    qu, ku, vu, q, k, v = (t.flatten() for t in (*ahead, *own))
    sigmoid, silu = torch.sigmoid, torch.nn.functional.silu
    u0 = sigmoid(qu[0] * ku[1]) * vu[1] + sigmoid(qu[0] * ku[2]) * vu[2]
    u1 = sigmoid(qu[1] * ku[2]) * vu[2]
    scores = torch.stack([q[2] * k[0] - silu(q[2] * u0), q[2] * k[1] - silu(q[2] * u1), q[2] * k[2]])
    out, _ = lookahead_attention(tuple(ahead), tuple(own))
    assert_same(out[0, 2, 0, 0], (scores.softmax(0) * v).sum(), "third token")


@pytest.mark.parametrize("window", [None, 5, 83])
def test_a_sequence_in_chunks_is_the_sequence(window: int | None) -> None:
    ahead, own = six(151)
    want, gathered = lookahead_attention(ahead, own, window=window)
    u, at = None, 0
    for n in (1, 70, 3, 1, 1, 75):
        now, seen = slice(at, at + n), slice(0, at + n)
        chunk = (ahead[0][:, seen], ahead[1][:, now], ahead[2][:, now]), (own[0][:, now], own[1][:, seen], own[2][:, seen])
        out, u = lookahead_attention(*chunk, window=window, state=u)
        assert_same(out, want[:, now], f"{n} tokens at {at}", tol=1e-12)
        at += n
    assert_same(u, gathered, "lookahead keys", tol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 37, 71])
def test_gradients_are_those_of_the_definition(window: int | None) -> None:
    ahead, own = six(149)
    leaves = [t.clone().requires_grad_() for t in (*ahead, *own)]
    probe = randn(B, 149, H, D, seed=9)

    def grads(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((out * probe).sum(), leaves)

    want = grads(castle_parallel(tuple(leaves[:3]), tuple(leaves[3:]), window))
    got = grads(lookahead_attention(tuple(leaves[:3]), tuple(leaves[3:]), window=window)[0])
    for name, a, b in zip(("q_u", "k_u", "v_u", "q", "k", "v"), got, want, strict=True):
        assert b.abs().max() > 1e-3
        assert_same(a, b, f"gradient of {name}", tol=1e-12)


def test_gradient_of_the_state() -> None:
    ahead, own = six(11)
    ahead, own = (ahead[0], ahead[1][:, 4:], ahead[2][:, 4:]), (own[0][:, 4:], own[1], own[2])
    state = randn(B, 4, H, D, seed=8).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: lookahead_attention(ahead, own, state=u, window=3)[0], (state,), fast_mode=True)


def test_a_window_is_how_far_a_key_looks() -> None:
    ahead, own = six(41)
    _, u = lookahead_attention(ahead, own, window=6)
    shorter = tuple(t[:, :20] for t in ahead), tuple(t[:, :20] for t in own)
    _, then = lookahead_attention(*shorter, window=6)
    assert_same(then[:, :14], u[:, :14], "keys whose window had passed", tol=1e-14)
    assert (then[:, 14:20] - u[:, 14:20]).abs().amax((0, 2, 3)).min() > 1e-3, "a key has not gathered from its window"


def test_single_precision_is_as_good_as_its_inputs() -> None:
    """U is undone block by block in the backward pass: rounding must not build up."""
    ahead, own = six(509, dtype=torch.float32)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (*ahead, *own)]
        out, _ = lookahead_attention(tuple(leaves[:3]), tuple(leaves[3:]))
        assert out.dtype == dtype
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        assert (got.double() - want).abs().max() < 2e-5 * want.abs().max()


# ---- memory ----------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest tensor that an operation returns, in elements."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor):
                self.seen = max(self.seen, t.numel())
        return result


def test_training_keeps_and_makes_nothing_that_grows_with_the_square() -> None:
    kept, largest = [], []
    for length in (512, 2048):
        leaves = [randn(1, length, 1, 8, seed=i, dtype=torch.float32).requires_grad_() for i in range(6)]
        saved: dict[int, int] = {}
        with (
            Largest() as watch,
            torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.setdefault(id(t), t.nbytes) and t, lambda t: t),
        ):
            out, _ = lookahead_attention(tuple(leaves[:3]), tuple(leaves[3:]))
            out.square().sum().backward()
        kept.append(sum(saved.values()))
        largest.append(watch.seen)
    assert kept[1] <= 4 * kept[0]
    assert largest[1] <= 4 * largest[0] and largest[1] <= 2048 * kernel.BLOCK
    with Largest() as watch:
        castle_parallel(tuple(leaves[:3]), tuple(leaves[3:]))
    assert watch.seen >= 2048**2, "the definition makes whole matrices: the watch can see them"


# ---- positions and the cache -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 4])
def test_only_distances_count(window: int | None) -> None:
    layer, x = mixer(window), randn(1, 19, 23)
    far = layer(x, positions=torch.arange(19) + 1000)
    assert_same(far, layer(x), "the same tokens further on", tol=1e-9)
    assert (mixer(window, rope=False)(x) - layer(x)).abs().max() > 1e-3


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
@pytest.mark.parametrize("window", [None, 3])
def test_forked_rows_go_their_own_ways(layout: Any, window: int | None) -> None:
    layer = mixer(window)
    x, left, right = randn(1, 7, 23), randn(1, 5, 23, seed=1), randn(1, 6, 23, seed=2)
    cache = layer.new_cache(rows=3, layout=layout, page_size=8)
    layer(x[0], seq=SeqInfo((7,), ids=(1,)), cache=cache)
    cache.fork(1, 2)
    ys = [layer(more[0], seq=SeqInfo((more.shape[1],), ids=(row,)), cache=cache) for row, more in ((1, left), (2, right))]
    for y, more in zip(ys, (left, right), strict=True):
        assert_same(y, layer(torch.cat([x, more], 1))[0, 7:], "after the fork")
    cache.reorder([2, 0, 1])
    assert cache.lengths == (13, 0, 12)
    token = randn(1, 1, 23, seed=3)
    y = layer(token[0], seq=SeqInfo((1,), ids=(0,)), cache=cache)
    assert_same(y, layer(torch.cat([x, right, token], 1))[0, -1:], "after the reorder")


def test_saved_and_loaded() -> None:
    layer, x = mixer(), randn(2, 17, 23)
    cache, other = layer.new_cache(rows=2), layer.new_cache(rows=2, max_len=17)
    layer(x[:, :12], cache=cache)
    other.load(cache.save())
    assert_same(layer(x[:, 12:], cache=other), layer(x)[:, 12:], "after loading")


def test_what_was_gathered_cannot_be_taken_back() -> None:
    layer, x = mixer(), randn(1, 9, 23)
    cache = layer.new_cache(rows=1)
    layer(x, cache=cache)
    with pytest.raises(UnsupportedError, match="fork the row before"):
        cache.truncate([5])
    assert cache.lengths == (9,)
    cache.truncate([9])
    cache.truncate([0])
    assert_same(layer(x, cache=cache), layer(x), "from an emptied row")


def test_gathered_keys_are_wide_in_a_narrow_cache() -> None:
    layer = mixer().to(torch.bfloat16)
    cache = layer.new_cache(rows=1, max_len=7)
    assert [spec.dtype for spec in layer.cache_specs()] == [None, torch.float32]
    assert cache.nbytes() == layer.cache_bytes(7) == 7 * H * 4 * (3 * 2 + 4)


def test_the_part_refuses_what_it_cannot_hold() -> None:
    spec = PartSpec("lookahead", (("u", (2, 3)),))
    (part,) = make_cache([spec], 3, 5, layout="paged").parts
    assert isinstance(part, LookaheadPart)
    part.put([0, 2], 0, (randn(2, 4, 2, 3, dtype=torch.float32),), 4)
    assert part.lengths == (4, 0, 4)
    for rows, first, shape, count in (([0, 1], 0, (2, 5, 2, 3), 1), ([0], 2, (1, 2, 2, 3), 1), ([0], 5, (1, 0, 2, 3), 1)):
        with pytest.raises(ShapeError, match="wanted u"):
            part.put(rows, first, (randn(*shape, dtype=torch.float32),), count)
    with pytest.raises(CacheError, match="max_len=5"):
        part.put([0], 4, (randn(1, 2, 2, 3, dtype=torch.float32),), 2)
    with pytest.raises(UnsupportedError, match="replaces both"):
        part.write((randn(1, 2, 3),), SeqInfo((1,)))
    assert part.lengths == (4, 0, 4)


def test_a_row_takes_the_memory_of_its_own_tokens_and_gives_it_back() -> None:
    spec = PartSpec("lookahead", (("u", (2, 3)),))
    (part,) = make_cache([spec], 5).parts
    assert isinstance(part, LookaheadPart) and part.nbytes() == 0
    for row, length in ((1, 17), (3, 101)):
        part.put([row], 0, (randn(1, length, 2, 3, dtype=torch.float32),), length)
    assert part.nbytes() == (17 + 101) * 6 * 4
    part.fork(1, 4)
    part.reset([3])
    assert part.nbytes() == 2 * 17 * 6 * 4 and torch.equal(part.read(4).tensors[0], part.read(1).tensors[0])
    part.truncate({1: 0, 4: 17})
    assert part.nbytes() == 17 * 6 * 4


def test_bad_calls_restate_themselves() -> None:
    ahead, own = six(5)
    whole = lookahead_attention(ahead, own)[0]
    assert torch.equal(lookahead_attention(ahead, own, impl="blocked")[0], whole)
    with pytest.raises(UnknownNameError, match="fastest"):
        lookahead_attention(ahead, own, impl="fastest")
    with pytest.raises(OptionError, match="window=0"):
        lookahead_attention(ahead, own, window=0)
    with pytest.raises(OptionError, match="window must be at least 1"):
        build("castle-swl", 12, 3, window=0)
    cut = (own[0][:, 3:], own[1], own[2])
    new = (ahead[0], ahead[1][:, 3:], ahead[2][:, 3:])
    with pytest.raises(ShapeError, match=r"state must be \[2, 3, 3, 5\]; got none"):
        lookahead_attention(new, cut)
    with pytest.raises(ShapeError, match="k_u and v_u must be like q"):
        lookahead_attention(ahead, cut, state=randn(B, 3, H, D))
    with pytest.raises(UnsupportedError, match="3 tokens came before"):
        lookahead_attention(new, cut, state=randn(B, 3, H, D), impl="reference")
    with pytest.raises(ShapeError, match="one dtype"):
        lookahead_attention(ahead, (own[0], own[1], own[2].float()))
