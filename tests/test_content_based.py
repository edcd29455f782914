"""What is peculiar to attention by content: which keys a token sees, what later tokens may change, and what everything costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attlas.catalogue.index import build
from attlas.errors import AttlasError, OptionError, ShapeError, UnsupportedError
from attlas.nn.reversible import Reversible
from attlas.ops.cluster import clustered_attention, hamming_kmeans, routed_attention, sign_bits
from attlas.ops.lsh import lsh_attention, lsh_hash, make_rotations, unit_keys
from attlas.reference import content as truth
from attlas.testing.budget import assert_same
from attlas.testing.inputs import randn

WINDOWS: list[dict[str, Any]] = [
    {"rule": "paper"},
    {"rule": "paper", "before": 0},
    {"rule": "paper", "before": 2, "after": 1, "causal": "content-leaks"},
    {"rule": "paper", "causal": True},
    {"rule": "paper", "causal": True, "before": 2},
    {"rule": "paper", "causal": True, "own": "always"},
    {"rule": "trax", "causal": "content-leaks"},
    {"rule": "trax", "after": 1},
]


@pytest.mark.parametrize("options", WINDOWS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize(("length", "chunk", "rounds"), [(1, 3, 2), (7, 7, 1), (13, 5, 3), (29, 3, 2), (11, 64, 2)])
def test_lsh_attention_is_its_definition(options: dict[str, Any], length: int, chunk: int, rounds: int) -> None:
    q = randn(2, length, 3, 6, seed=1).requires_grad_()
    v = randn(2, length, 3, 6, seed=2).requires_grad_()
    hashes = lsh_hash(q, make_rotations(3, 6, rounds, (4,), seed=5), (4,))
    probe, found = randn(2, length, 3, 6, seed=3), []
    for run in (lsh_attention, truth.reformer):
        y = run(q, unit_keys(q), v, hashes, chunk=chunk, scale=1.3, **options)
        grads = torch.autograd.grad((y * probe).sum(), (q, v), allow_unused=True)
        found.append([y, *(torch.zeros(1) if g is None else g for g in grads)])
    for what, got, want in zip(("output", "gradient of q", "gradient of v"), *found, strict=True):
        assert_same(got, want, what)


def test_many_rows_are_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    q = randn(2, 29, 3, 6)
    hashes = lsh_hash(q, make_rotations(3, 6, 2, (4,), seed=5), (4,))
    whole = lsh_attention(q, unit_keys(q), q, hashes, chunk=5)
    monkeypatch.setattr("attlas.ops.lsh._PAIRS", 2 * 2 * 29 * 5 * 2)  # two of the six rows at a time
    assert_same(lsh_attention(q, unit_keys(q), q, hashes, chunk=5), whole, "in pieces")


@pytest.mark.parametrize("window", [{"before": 1}, {"before": 2, "after": 1}, {"before": 1, "length": 27}])
def test_chunks_that_need_no_mask_are_cut_into_pieces(window: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    length = window.pop("length", 29)
    q = randn(1, length, 3, 6)
    hashes = lsh_hash(q, make_rotations(3, 6, 2, (4,), seed=5), (4,))
    want = truth.reformer(q, unit_keys(q), q, hashes, chunk=3, rule="trax", **window)
    monkeypatch.setattr("attlas.ops.lsh._PIECE", 3 * 3 * 3 * 3 * 4)
    assert_same(lsh_attention(q, unit_keys(q), q, hashes, chunk=3, rule="trax", **window), want, "in pieces")


def test_hashes_are_found_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    q, rotations = randn(2, 29, 3, 6), make_rotations(3, 6, 2, (4, 2), seed=5)
    whole = lsh_hash(q, rotations, (4, 2))
    monkeypatch.setattr("attlas.ops.lsh._HASHED", 7 * 2 * 3 * 2 * 3)
    assert torch.equal(lsh_hash(q, rotations, (4, 2)), whole)


def test_a_hash_is_the_direction_that_is_nearest() -> None:
    x, rotations = randn(1, 17, 2, 5), make_rotations(2, 5, 3, (6, 4), seed=2)
    got = lsh_hash(x, rotations, (6, 4))
    for t in range(17):
        for h in range(2):
            for r in range(3):
                y = [float(x[0, t, h] @ rotations[h, :, r, n]) for n in range(5)]
                first, second = [*y[:3], *(-a for a in y[:3])], [*y[3:], *(-a for a in y[3:])]
                assert got[0, t, h, r] == first.index(max(first)) + 6 * second.index(max(second))
    assert torch.equal(lsh_hash(7 * x, rotations, (6, 4)), got)  # the length of a query does not count


def test_keys_of_shared_queries() -> None:
    """One bucket, one chunk: all other tokens, by keys of length 1; a token alone sees itself."""
    q, v = randn(1, 11, 2, 5, seed=1), randn(1, 11, 2, 5, seed=2)
    none = torch.zeros(1, 11, 2, 1, dtype=torch.int64)
    scores = torch.einsum("bihd,bjhd->bhij", q, q / q.norm(dim=-1, keepdim=True))
    scores.diagonal(dim1=-2, dim2=-1).fill_(-math.inf)
    want = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    assert_same(lsh_attention(q, unit_keys(q), v, none, chunk=11, scale=1.0), want, "one bucket", tol=1e-5)  # the norm's epsilon
    apart = torch.arange(11)[None, :, None, None].expand(1, 11, 2, 1)
    assert_same(lsh_attention(q, unit_keys(q), v, apart, chunk=3), v, "every token in a bucket of its own")


def test_a_key_found_in_two_rounds_counts_once() -> None:
    q, v = randn(1, 23, 2, 5, seed=1), randn(1, 23, 2, 5, seed=2)
    once = lsh_hash(q, make_rotations(2, 5, 1, (4,), seed=5), (4,))
    for causal in (False, True):
        one, two = (lsh_attention(q, unit_keys(q), v, h, chunk=5, causal=causal) for h in (once, once.expand(-1, -1, -1, 2)))
        assert_same(two, one, f"the same hashes twice, causal={causal}")


LEAKY = [("reformer", {"chunk": 5, "buckets": 4, "rounds": 2}), ("routing", {"clusters": 3, "window": 7})]


@pytest.mark.parametrize(("name", "options"), LEAKY)
@pytest.mark.parametrize("causal", [True, "content-leaks"])
def test_only_the_named_option_leaks(name: str, options: dict[str, Any], causal: Any) -> None:
    mixer = build(name, 23, 3, head_dim=6, causal=causal, **options).double().eval()
    x = randn(1, 41, 23)
    y = mixer(x)
    moved = max(
        (mixer(torch.cat([x[:, :t], randn(1, 41 - t, 23, seed=s)], 1))[:, :t] - y[:, :t]).abs().max().item()
        for t, s in ((10, 1), (20, 2), (31, 3), (40, 4))
    )
    if causal is True:
        assert mixer.causal and moved < 1e-12
    else:
        assert not mixer.causal and moved > 1e-3  # masked by position, and yet
        with pytest.raises(UnsupportedError, match="depend on later tokens"):
            mixer.new_cache()


def test_what_cannot_be_causal_refuses() -> None:
    for name in ("clustered", "improved-clustered"):
        with pytest.raises(UnsupportedError, match=rf"{name}\(dim=26, num_heads=2.*depends on later tokens"):
            build(name, 26, 2, causal=True)
    with pytest.raises(OptionError, match=r"rule 'trax' looks at neighbouring buckets.*content-leaks"):
        build("reformer", 26, 2, causal=True, rule="trax")
    with pytest.raises(OptionError, match="causal=True needs a window"):
        build("routing", 26, 2, causal=True)


BAD: list[tuple[str, dict[str, Any]]] = [
    ("reformer", {"chunk": 0}),
    ("reformer", {"rounds": 0}),
    ("reformer", {"buckets": 7}),
    ("reformer", {"buckets": (4, 3)}),
    ("reformer", {"buckets": ()}),
    ("reformer", {"before": -1}),
    ("reformer", {"rule": "papr"}),
    ("reformer", {"causal": "leaks"}),
    ("reformer", {"causal": True, "after": 1}),
    ("clustered", {"clusters": 0}),
    ("clustered", {"bits": 0}),
    ("improved-clustered", {"topk": 0}),
    ("routing", {"window": 0}),
    ("routing", {"decay": 1.5}),
    ("routing", {"causal": "leaks"}),
]


@pytest.mark.parametrize(("name", "options"), BAD)
def test_bad_options(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=rf"{name}\(dim=26, num_heads=2"):
        build(name, 26, 2, **options)


def test_bad_calls_of_the_ops() -> None:
    q, hashes = randn(1, 7, 2, 5), torch.zeros(1, 7, 2, 1, dtype=torch.int64)
    bits, means = torch.zeros(1, 7, 2, 3, dtype=torch.bool), randn(2, 3, 5)
    calls: list[tuple[type[AttlasError], Callable[[], Tensor]]] = [
        (ShapeError, lambda: lsh_attention(q, q[:, :6], q, hashes, chunk=3)),
        (ShapeError, lambda: lsh_attention(q, q, q, hashes[..., :0], chunk=3)),
        (OptionError, lambda: lsh_attention(q, q, q, hashes, chunk=3, own="always")),
        (ShapeError, lambda: clustered_attention(q, q, q, bits[:, :6], clusters=3)),
        (OptionError, lambda: clustered_attention(q, q, q, bits, clusters=0)),
        (ShapeError, lambda: routed_attention(q, q, q, means[:1], window=3)),
        (OptionError, lambda: routed_attention(q, q, q, means, window=0)),
    ]
    for kind, call in calls:
        with pytest.raises(kind, match=r"_attention\(q \[1, 7, 2, 5\]"):
            call()


@pytest.mark.parametrize(("length", "clusters", "iterations"), [(29, 5, 3), (13, 13, 2), (17, 3, 0), (61, 7, 10)])
def test_kmeans_is_its_definition(length: int, clusters: int, iterations: int) -> None:
    bits = sign_bits(randn(2, length, 3, 5), randn(11, 6, seed=4)).transpose(1, 2).flatten(0, 1)
    got = hamming_kmeans(bits, clusters, iterations)
    want = torch.stack([truth.hamming_clusters(row, clusters, iterations) for row in bits])
    assert torch.equal(got, want) and len(got.unique()) > 1


@pytest.mark.parametrize(("length", "clusters", "topk"), [(67, 3, 5), (67, 5, 67), (97, 2, 11), (37, 5, None), (37, 36, 3)])
def test_clustered_attention_is_its_definition(length: int, clusters: int, topk: int | None) -> None:
    """Clusters of more members than a tile holds, and of none."""
    q, k, v = (randn(2, length, 3, 5, seed=s) for s in (1, 2, 3))
    bits = sign_bits(q, randn(7, 6, seed=4))
    got = clustered_attention(q, k, v, bits, clusters=clusters, iterations=2, topk=topk)
    assert_same(got, truth.clustered(q, k, v, bits, clusters, 2, topk), f"clusters={clusters}, topk={topk}")


def test_clusters_do_not_depend_on_the_default_dtype() -> None:
    bits = randn(3, 19, 11) > 0
    want = hamming_kmeans(bits, 5, 3)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(hamming_kmeans(bits, 5, 3), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_weights_of_clustered_attention_sum_to_one() -> None:
    q, k = randn(1, 43, 2, 5, seed=1), randn(1, 43, 2, 5, seed=2)
    ones, bits = torch.ones_like(q), sign_bits(q, randn(7, 6, seed=4))
    for topk in (None, 3):
        assert_same(clustered_attention(q, k, ones, bits, clusters=5, topk=topk), ones, f"topk={topk}")


def test_more_clusters_than_tokens() -> None:
    x = randn(2, 7, 23)
    for name, options in (("clustered", {"clusters": 50}), ("improved-clustered", {"clusters": 50, "topk": 90})):
        assert build(name, 23, 1, **options).double()(x).isfinite().all()
    few = build("routing", 23, 1, clusters=50).double().eval()  # each takes one token, and some take the same one
    assert few(x).isfinite().all()


def test_tokens_that_no_cluster_takes_get_zero() -> None:
    q, v = randn(1, 31, 2, 5, seed=1), randn(1, 31, 2, 5, seed=2)
    means = randn(2, 3, 5, seed=3)
    y = routed_attention(q, q, v, means, window=4)
    taken = torch.einsum("bthd,hcd->bhct", q, means).topk(4, dim=-1).indices
    for h in range(2):
        left_out = set(range(31)) - set(taken[0, h].flatten().tolist())
        assert len(left_out) >= 31 - 12 and not y[0, sorted(left_out), h].any()


def test_routing_learns_its_means_in_training_only() -> None:
    mixer = build("routing", 23, 3, head_dim=6, clusters=5, decay=0.9).double()
    before, x = mixer.means.clone(), randn(2, 29, 23)
    mixer.eval()(x)
    assert torch.equal(mixer.means, before)
    mixer.train()(x)
    q, k, _ = mixer._qkv(x)
    for h in range(3):
        members: list[list[Tensor]] = [[] for _ in range(5)]
        for token in torch.cat([q[:, :, h], k[:, :, h]]).flatten(0, 1).detach():
            members[int((before[h] @ token).argmax())].append(token / token.norm())
        for c, group in enumerate(members):
            want = before[h, c]
            if group:
                mean = torch.stack(group).mean(0)
                want = 0.9 * want + 0.1 * mean / mean.norm()
            torch.testing.assert_close(mixer.means[h, c], want / want.norm(), atol=1e-12, rtol=0)
    assert "means" in mixer.state_dict()


@pytest.mark.parametrize("name", ["reformer", "clustered", "improved-clustered", "routing"])
def test_what_is_drawn_depends_on_the_seed_alone(name: str) -> None:
    drawn = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        mixer = build(name, 23, 3, head_dim=6, seed=5)
        assert not torch.equal(torch.get_rng_state(), state)  # weights are drawn from the global generator
        drawn.append(next(b for n, b in mixer.named_buffers() if n in ("rotations", "planes", "means")))
    assert torch.equal(*drawn)


class Count:
    """Bytes that autograd keeps for the backward pass."""

    def __init__(self) -> None:
        self.kept: dict[int, int] = {}

    def pack(self, t: Tensor) -> Tensor:
        self.kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    @classmethod
    def of(cls, run: Callable[[], Any]) -> int:
        count = cls()
        with torch.autograd.graph.saved_tensors_hooks(count.pack, lambda t: t):
            held = run()  # alive until everything is counted, so that no address is used twice
        del held
        return sum(count.kept.values())


def layers(depth: int) -> list[tuple[nn.Module, nn.Module]]:
    torch.manual_seed(3)
    out: list[tuple[nn.Module, nn.Module]] = []
    for _ in range(depth):
        mixer = build("reformer", 23, 3, head_dim=6, chunk=5, buckets=4, causal=True)
        network = nn.Sequential(nn.LayerNorm(23), nn.Linear(23, 31), nn.GELU(), nn.Linear(31, 23))
        out.append((nn.Sequential(nn.LayerNorm(23), mixer), network))
    return out


def plain(pairs: list[tuple[nn.Module, nn.Module]], x: Tensor) -> tuple[Tensor, Tensor]:
    x1 = x2 = x
    for f, g in pairs:
        x1 = x1 + f(x2)
        x2 = x2 + g(x1)
    return x1, x2


def test_reversible_layers_have_exact_gradients() -> None:
    pairs = [(f.double(), g.double()) for f, g in layers(3)]
    pairs.append((pairs[0][0], pairs[1][1]))  # modules that are used twice
    stack = Reversible(pairs)
    found = []
    for run in (lambda x: stack(x, x), lambda x: plain(pairs, x)):
        x = randn(2, 29, 23).requires_grad_()
        y1, y2 = run(x)
        loss = (y1 * randn(2, 29, 23, seed=1)).sum() + y2.square().sum()
        found.append([y1, y2, *torch.autograd.grad(loss, [x, *stack.parameters()])])
    for got, want in zip(*found, strict=True):
        assert_same(got, want, "reversible against plain layers")


def test_reversible_layers_keep_no_activations() -> None:
    x = randn(1, 61, 23, dtype=torch.float32).requires_grad_()
    kept: dict[Any, list[int]] = {"reversible": [], "plain": []}
    for depth in (1, 5):
        pairs = layers(depth)
        stack = Reversible(pairs)
        weights = sum(p.nbytes for p in stack.parameters())
        kept["reversible"].append(Count.of(lambda s=stack: s(x, x)) - weights)
        kept["plain"].append(Count.of(lambda p=pairs: plain(p, x)) - weights)
    assert kept["reversible"][0] == kept["reversible"][1] == 2 * x.nbytes  # y1 and y2
    assert kept["plain"][1] > 4 * kept["plain"][0] > 40 * x.nbytes
