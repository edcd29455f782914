"""Longformer, BigBird and LSH attention beside the modules of transformers that hold the same weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attlas.catalogue.index import build, cards
from attlas.lab.gate import TOLERANCE
from attlas.lab.measure import Thunk, peak_rss, time_interleaved
from attlas.lab.scaling_growth import forward, results, training
from attlas.masks import Blocks, Window
from attlas.nn.mixer import Mixer
from attlas.nn.projection import project

DIM, HEADS, WINDOW, BLOCK, RANDOM = 768, 12, 512, 64, 3
CHECKED, WARM = 2048, 1024  # tokens of the check, and of what is run before memory is measured
ROUNDS, CHUNK, BUCKETS = 4, 64, 128  # of LSH attention
# impl -> forward, training: least times faster, with the compiled core and without it.
LONG = {"auto": (8.0, 5.0), "blocked": (3.0, 3.0)}


@dataclass(frozen=True)
class Pair:
    """mine and theirs: the same function of x [1, T, dim] with the same weights, at the length that they were made for."""

    mine: Mixer
    theirs: nn.Module


class Their(nn.Module):
    """A module of transformers as x -> y. Without dropout; in train mode, as BigBird draws random blocks in no other."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.inner, x)


def longformer(tokens: int) -> Pair:
    """LongformerSelfAttention with a window of 512 and the first token global."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=DIM, num_attention_heads=HEADS, attention_window=[WINDOW], attention_probs_dropout_prob=0.0
    )
    marks = torch.zeros(1, tokens)
    marks[:, 0] = 10000.0
    given = {"attention_mask": marks, "is_index_masked": marks < 0, "is_index_global_attn": marks > 0, "is_global_attn": True}
    theirs = Their(LongformerSelfAttention(config, layer_id=0), lambda module, x: module(x, **given)[0])
    side = WINDOW // 2
    mine = build("longformer", DIM, HEADS, window=Window(side, side), tokens=(0,), rope=False, bias=True)
    names = {f"{n}{far}": f"{n[0]}{far}_proj" for n in ("query", "key", "value") for far in ("", "_global")}
    return _paired(mine, theirs, names)


def bigbird(tokens: int) -> Pair:
    """BigBirdBlockSparseAttention with blocks of 64, and ours with the blocks that it draws."""
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    config = BigBirdConfig(
        hidden_size=DIM, num_attention_heads=HEADS, block_size=BLOCK, num_random_blocks=RANDOM, attention_probs_dropout_prob=0.0,
        max_position_embeddings=tokens,
    )  # fmt: skip
    inner = BigBirdBlockSparseAttention(config, seed=0).train()
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, tokens), BLOCK)
    given = {"from_blocked_mask": blocked, "to_blocked_mask": blocked, "band_mask": band, "from_mask": rows, "to_mask": columns}
    theirs = Their(inner, lambda module, x: module(x, **given)[0])
    mine = build("bigbird", DIM, HEADS, block=BLOCK, random_blocks=_drawn(theirs, tokens), rope=False, bias=True)
    return _paired(mine, theirs, {n: f"{n[0]}_proj" for n in ("query", "key", "value")})


class _Drawn(Exception):
    pass


def _drawn(theirs: Their, tokens: int) -> Blocks:
    """The random blocks of a length: drawn anew in every call, from the same seed. The call that shows them ends there, before it
    takes the memory that a process keeps and that `memory` could then not see."""
    layout = torch.zeros(HEADS, tokens // BLOCK, tokens // BLOCK, dtype=torch.bool)
    inner: Any = theirs.inner
    names = ("_bigbird_block_rand_mask", "_bigbird_block_rand_mask_with_head")
    draws = {name: getattr(inner, name) for name in names}
    seen: list[Any] = []

    def watch(draw: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            seen.append(draw(*given, **options))
            if draw.__name__.endswith("_with_head") or len(seen) == HEADS:
                raise _Drawn
            return seen[-1]

        return call

    for name, draw in draws.items():
        setattr(inner, name, watch(draw))
    with torch.no_grad(), contextlib.suppress(_Drawn):
        theirs(torch.zeros(1, tokens, DIM))
    for name, draw in draws.items():
        setattr(inner, name, draw)
    for head, rows in enumerate(seen[-HEADS:] if len(seen) >= HEADS else seen[-1]):
        for i, columns in enumerate(rows):
            layout[head, i + 1, columns.tolist()] = True
    return Blocks(layout, BLOCK)


def _paired(mine: Mixer, theirs: Their, names: dict[str, str]) -> Pair:
    """Copy the named linear maps; ours ends where theirs does, before the output projection."""
    with torch.no_grad():
        for name, own in names.items():
            source, target = getattr(theirs.inner, name), getattr(mine, own)
            target.weight.copy_(source.weight)
            if source.bias is not None:
                target.bias.copy_(source.bias)
    mine.o_proj = nn.Identity()
    return Pair(mine, theirs)


def reformer(tokens: int) -> Pair:
    """LSHSelfAttention with chunks of 64, 4 rounds and 128 buckets, bidirectional, and ours with its rotations."""
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = ReformerConfig(
        hidden_size=DIM, num_attention_heads=HEADS, attention_head_size=DIM // HEADS, num_hashes=ROUNDS, num_buckets=BUCKETS,
        lsh_attn_chunk_length=CHUNK, lsh_num_chunks_before=1, lsh_num_chunks_after=0, hash_seed=0, is_decoder=False,
        lsh_attention_probs_dropout_prob=0.0, max_position_embeddings=tokens,
    )  # fmt: skip
    theirs = Their(LSHSelfAttention(config), lambda module, x: module(x).hidden_states)
    torch.manual_seed(0)
    drawn = torch.randn(HEADS, DIM // HEADS, ROUNDS, BUCKETS // 2)
    mine = build("reformer", DIM, HEADS, chunk=CHUNK, rounds=ROUNDS, buckets=BUCKETS, rule="trax")
    rotations = mine.get_buffer("rotations")
    rotations.copy_(drawn.view_as(rotations))
    return _paired(mine, theirs, {"query_key": "q_proj", "value": "v_proj"})


@dataclass(frozen=True)
class Peer:
    """bars: impl -> least times faster forward and in training; memory: most of their peak memory, None = not measured."""

    make: Callable[[int], Pair]
    bars: dict[str, tuple[float, float]]
    memory: float | None = None


PEERS = {
    "longformer": Peer(longformer, LONG, 1 / 3),
    "bigbird": Peer(bigbird, LONG, 1 / 3),
    "reformer": Peer(reformer, {"auto": (2.0, 2.0)}),
}


def known(only: Sequence[str] = ()) -> tuple[str, ...]:
    """The peers whose mechanism is in the catalogue; `only`: those whose name contains one of the texts."""
    names = {c.name for c in cards(min_level=2)}
    return tuple(n for n in PEERS if n in names and (not only or any(text in n for text in only)))


def check(name: str) -> str | None:
    """What differs at a short length, None = nothing: outputs and gradients of x, for both of our implementations."""
    torch.manual_seed(0)
    pair = PEERS[name].make(CHECKED)
    x = torch.randn(1, CHECKED, DIM)
    want = results(pair.theirs, x)
    for impl in PEERS[name].bars:
        for what, a, b in zip(("output", "gradient"), results(pair.mine.use(impl), x), want, strict=True):
            error = float((a - b).abs().max() / b.abs().max())
            if not error <= TOLERANCE:
                return f"{name}, impl {impl}: the {what} differs from that of transformers by {error:.1e} of the largest one"
    return None


def measure(name: str, tokens: int, repeats: int, max_seconds: float) -> dict[str, Any]:
    """Forward, and forward and backward to x and all weights, of both in turns, and of the projections that both cannot do
    without, with torch and as ours does them: what is left of the times without those is the attention itself."""
    torch.manual_seed(0)
    pair, bars = PEERS[name].make(tokens), PEERS[name].bars
    x = torch.randn(1, tokens, DIM)
    shared = [nn.Linear(DIM, DIM) for _ in range(3)]
    contenders: dict[str, Thunk] = {}
    for what, timed in (("forward", forward), ("training", training)):
        for side in ("theirs", "auto"):
            contenders[f"{what} projections {side}"] = timed(_Sum(shared, side), x)
        contenders[f"{what} theirs"] = timed(pair.theirs, x)
        for impl in bars:
            contenders[f"{what} {impl}"] = _with(pair.mine, impl, timed(pair.mine, x))
    first = time_interleaved({"f": contenders["forward auto"]}, 1, warmup=0, min_sample=0)["f"].median
    for impl in bars:
        contenders[f"forward {impl}"]()
    times = time_interleaved(contenders, repeats, warmup=0, min_sample=0, max_seconds=max_seconds)
    row: dict[str, Any] = {"name": name, "tokens": tokens, "seconds": {k: t.to_dict() for k, t in times.items()}, "ratios": {}}
    for i, what in enumerate(("forward", "training")):
        theirs = times[f"{what} theirs"].median
        common = {side: times[f"{what} projections {side}"].median for side in ("theirs", "auto")}
        for impl, least in bars.items():
            mine = times[f"{what} {impl}"].median
            left = mine - common.get(impl, common["theirs"])
            beyond = max(0.0, theirs - common["theirs"]) / left if left > 0 else None  # None: less than the spread of the times
            row["ratios"][f"{what} {impl}"] = {"ratio": theirs / mine, "beyond_projections": beyond, "bar": least[i]}
    row["first_seconds"] = max(0.0, first - times["forward auto"].median)
    return row


class _Sum(nn.Module):
    """The sum of several linear maps of x, as mixers with that `impl` compute them."""

    def __init__(self, parts: list[nn.Linear], impl: str) -> None:
        super().__init__()
        self.parts, self.impl, self.owned = parts, impl, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        out, *others = (project(x, part, self.impl) for part in self.parts)
        for other in others:
            out += other
        return out


def _with(mixer: Mixer, impl: str, call: Thunk) -> Thunk:
    def run() -> object:
        mixer.use(impl)
        return call()

    return run


# ---- memory -------------------------------------------------------------------------------------------------------------------


def memory(name: str, tokens: int) -> dict[str, Any]:
    """Peak resident memory of one forward and backward pass beyond what model and input hold, each in a process of its own."""
    mine, theirs = (peak_rss(_step, (name, tokens, side), setup=_made).growth for side in ("mine", "theirs"))
    return {"name": name, "tokens": tokens, "mine": mine, "theirs": theirs, "ratio": mine / theirs, "bar": PEERS[name].memory}


def _made(name: str, tokens: int, side: str) -> Thunk:
    """A training step, with a short one done before, so that what libraries allocate once is not counted."""
    module: Any = getattr(PEERS[name].make(WARM), side)
    training(module, torch.randn(1, WARM, DIM))()
    long: Any = getattr(PEERS[name].make(tokens), side)
    return training(long, torch.randn(1, tokens, DIM))


def _step(call: Thunk) -> None:
    call()
