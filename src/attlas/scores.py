"""Score modifications: what may happen to a score `scale * q.k` between the product and the softmax.

A `ScoreMod` maps scores `[..., H, tq, tk]` to scores of the same shape, given the absolute positions of the queries `[tq]` and
of the keys `[tk]`. It never changes which keys may be attended to: that is the mask's part. `a >> b` applies `a`, then `b`.

    Alibi(slopes)            s - slope_h * |q - k|                    Press et al. 2021, arXiv:2108.12409
    RelativeBias(table)      s + table[bucket(k - q), h]              Raffel et al. 2019 (T5), arXiv:1910.10683
    RelativeBias.dense(b)    s + b[h, row(q), k]                      a learned bias of any shape
    Softcap(cap)             cap * tanh(s / cap)                      Gemma 2, arXiv:2408.00118

The tensors of a mod (slopes, tables) may require grad; every implementation of attention returns their exact gradient.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from attlas.errors import OptionError, ShapeError

T = TypeVar("T", Tensor, "Tensor | None")


class ScoreMod(ABC):
    """A function of scores and positions. Subclasses implement `__call__`, and `tensors`/`replace_tensors` if they hold any."""

    @abstractmethod
    def __call__(self, scores: Tensor, q_pos: Tensor, k_pos: Tensor, heads: Tensor | None = None) -> Tensor:
        """Scores `[..., H, tq, tk]`, absolute positions `[tq]`, `[tk]`, head indices `[H]` (None = all heads in order)."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the scores depend on, in a fixed order."""
        return ()

    def replace_tensors(self, tensors: Sequence[Tensor]) -> ScoreMod:
        """The same mod with other tensors, in the order of `tensors()`."""
        assert not tensors
        return self

    @property
    def heads(self) -> int | None:
        """Number of heads the mod is made for; None = any."""
        return None

    @property
    def batch(self) -> int | None:
        """Batch rows the mod is made for; None = the same for all rows."""
        return None

    def narrow(self, tensors: Sequence[T], start: int, stop: int) -> list[T]:
        """Of tensors shaped like `tensors()` (or their gradients): the views that belong to batch rows start..stop-1."""
        return list(tensors)

    def rows(self, start: int, stop: int) -> ScoreMod:
        """The mod of batch rows start..stop-1."""
        return self.replace_tensors(self.narrow(self.tensors(), start, stop))

    def backward(
        self, scores: Tensor, grad: Tensor, q_pos: Tensor, k_pos: Tensor, heads: Tensor | None, sums: Sequence[Tensor | None]
    ) -> Tensor:
        """Vector-Jacobian product on one block: returns d/d scores and adds d/d tensors onto `sums` (None = not wanted).

        `scores` are the mod's input, `grad` is the gradient of its output. The default differentiates `__call__` and is exact
        for any mod; a subclass overrides it only to save time.
        """
        with torch.enable_grad():
            leaf = scores.detach().requires_grad_()
            params = [t.detach().requires_grad_(s is not None) for t, s in zip(self.tensors(), sums, strict=True)]
            out = self.replace_tensors(params)(leaf, q_pos, k_pos, heads)
            wanted = [leaf, *(p for p in params if p.requires_grad)]
            found = torch.autograd.grad(out, wanted, grad, allow_unused=True)
        for total, piece in zip((s for s in sums if s is not None), found[1:], strict=True):
            if piece is not None:
                total.add_(piece)
        return torch.zeros_like(grad) if found[0] is None else found[0]

    def __rshift__(self, other: ScoreMod) -> ScoreMod:
        if not isinstance(other, ScoreMod):
            return NotImplemented
        return Chain((*_links(self), *_links(other)))


def _links(mod: ScoreMod) -> tuple[ScoreMod, ...]:
    return mod.mods if isinstance(mod, Chain) else (mod,)


def _agree(kind: str, sizes: list[int | None]) -> int | None:
    known = {s for s in sizes if s is not None}
    if len(known) > 1:
        raise ShapeError(f"score mods in a chain are made for different numbers of {kind}: {sorted(known)}")
    return known.pop() if known else None


@dataclass(frozen=True)
class Chain(ScoreMod):
    """`mods[0]`, then `mods[1]`, ...: what `a >> b` builds."""

    mods: tuple[ScoreMod, ...]

    def __post_init__(self) -> None:
        _ = self.heads, self.batch

    def __call__(self, scores: Tensor, q_pos: Tensor, k_pos: Tensor, heads: Tensor | None = None) -> Tensor:
        for mod in self.mods:
            scores = mod(scores, q_pos, k_pos, heads)
        return scores

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for mod in self.mods for t in mod.tensors())

    def replace_tensors(self, tensors: Sequence[Tensor]) -> Chain:
        mods, at = [], 0
        for mod in self.mods:
            n = len(mod.tensors())
            mods.append(mod.replace_tensors(tensors[at : at + n]))
            at += n
        assert at == len(tensors)
        return Chain(tuple(mods))

    @property
    def heads(self) -> int | None:
        return _agree("heads", [mod.heads for mod in self.mods])

    @property
    def batch(self) -> int | None:
        return _agree("batch rows", [mod.batch for mod in self.mods])

    def narrow(self, tensors: Sequence[T], start: int, stop: int) -> list[T]:
        found: list[T] = []
        for mod in self.mods:
            found += mod.narrow(tensors[len(found) : len(found) + len(mod.tensors())], start, stop)
        return found

    def backward(
        self, scores: Tensor, grad: Tensor, q_pos: Tensor, k_pos: Tensor, heads: Tensor | None, sums: Sequence[Tensor | None]
    ) -> Tensor:
        inputs = [scores]
        for mod in self.mods[:-1]:
            inputs.append(mod(inputs[-1], q_pos, k_pos, heads))
        end = len(sums)
        for mod, given in zip(reversed(self.mods), reversed(inputs), strict=True):
            begin = end - len(mod.tensors())
            grad = mod.backward(given, grad, q_pos, k_pos, heads, sums[begin:end])
            end = begin
        return grad

    def __repr__(self) -> str:
        return " >> ".join(map(repr, self.mods))


@dataclass(frozen=True)
class Softcap(ScoreMod):
    """`cap * tanh(s / cap)`: keeps scores in (-cap, cap)."""

    cap: float

    def __post_init__(self) -> None:
        if not self.cap > 0:
            raise OptionError(f"Softcap(cap={self.cap}): cap must be positive")

    def __call__(self, scores: Tensor, q_pos: Tensor, k_pos: Tensor, heads: Tensor | None = None) -> Tensor:
        return torch.tanh(scores / self.cap) * self.cap

    def backward(
        self, scores: Tensor, grad: Tensor, q_pos: Tensor, k_pos: Tensor, heads: Tensor | None, sums: Sequence[Tensor | None]
    ) -> Tensor:
        slope = torch.tanh(scores / self.cap).square_().neg_().add_(1.0)
        return slope.mul_(grad)


def _distance(q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """k - q, int64 [tq, tk]."""
    return k_pos - q_pos[:, None]


@dataclass(frozen=True, eq=False)
class Alibi(ScoreMod):
    """`s - slope_h * |q - k|`: attention with linear biases. `slopes` `[H]`, any real numbers, may require grad."""

    slopes: Tensor

    def __post_init__(self) -> None:
        if self.slopes.ndim != 1:
            raise ShapeError(f"Alibi: slopes must be [H], got {list(self.slopes.shape)}")

    @classmethod
    def for_heads(cls, num_heads: int, *, device: torch.device | str | None = None) -> Alibi:
        """The slopes of the paper: 2^(-8h/n) for n heads, n a power of two.

        For any other number of heads: the slopes of the power of two below, then every other slope of the power of two above,
        as BLOOM and MPT do.
        """
        if num_heads < 1:
            raise OptionError(f"Alibi.for_heads({num_heads}): at least one head is needed")
        below = 1 << (num_heads.bit_length() - 1)
        exponents = [8 * h / below for h in range(1, below + 1)]
        exponents += [4 * h / below for h in range(1, 2 * (num_heads - below), 2)]
        return cls(torch.tensor([2.0**-e for e in exponents], dtype=torch.float32, device=device))

    @property
    def heads(self) -> int:
        return self.slopes.shape[0]

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.slopes,)

    def replace_tensors(self, tensors: Sequence[Tensor]) -> Alibi:
        (slopes,) = tensors
        return Alibi(slopes)

    def __call__(self, scores: Tensor, q_pos: Tensor, k_pos: Tensor, heads: Tensor | None = None) -> Tensor:
        slopes = (self.slopes if heads is None else self.slopes[heads]).to(scores.dtype)
        return torch.addcmul(scores, slopes[:, None, None], _distance(q_pos, k_pos).abs_().to(scores.dtype), value=-1)

    def backward(
        self, scores: Tensor, grad: Tensor, q_pos: Tensor, k_pos: Tensor, heads: Tensor | None, sums: Sequence[Tensor | None]
    ) -> Tensor:
        (total,) = sums
        if total is not None:
            distance = _distance(q_pos, k_pos).abs_().to(grad.dtype).flatten()
            piece = torch.matmul(grad.flatten(-2), distance).reshape(-1, grad.shape[-3]).sum(0).neg_().to(total.dtype)
            if heads is None:
                total.add_(piece)
            else:
                total.index_add_(0, heads, piece)
        return grad

    def __repr__(self) -> str:
        return f"Alibi(slopes={list(self.slopes.shape)})"


def t5_bucket(relative: Tensor, *, num_buckets: int, bidirectional: bool, max_distance: int) -> Tensor:
    """T5's bucket of `relative` = key position - query position (int64, any shape): exact near zero, logarithmic up to
    `max_distance`, one bucket beyond. Bidirectional: the upper half of the buckets is for keys after the query; otherwise keys
    after the query share bucket 0. The logarithm is taken in fp32, as in T5: the bucket edges depend on it.
    """
    if bidirectional:
        half = num_buckets // 2
        offset, distance = (relative > 0).long() * half, relative.abs()
    else:
        half = num_buckets
        offset, distance = torch.zeros_like(relative), relative.neg().clamp(min=0)
    exact = half // 2
    steps = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    far = (exact + steps.long()).clamp(max=half - 1)
    return offset + torch.where(distance < exact, distance, far)


def _consecutive(pos: Tensor) -> bool:
    """Whether positions rise by one. Only asked on the CPU: elsewhere the answer would cost a synchronisation."""
    return pos.device.type == "cpu" and pos.numel() > 0 and bool((pos.diff() == 1).all())


@dataclass(frozen=True, eq=False)
class RelativeBias(ScoreMod):
    """T5's relative position bias: `s + table[bucket(k - q), h]`, `table` `[num_buckets, H]`, added after the scale.

    T5 itself uses scale=1.0, a bidirectional table in the encoder and `bidirectional=False` in the decoder.
    """

    table: Tensor
    bidirectional: bool = True
    max_distance: int = 128

    def __post_init__(self) -> None:
        if self.table.ndim != 2:
            raise ShapeError(f"RelativeBias: table must be [num_buckets, H], got {list(self.table.shape)}")
        exact = self.table.shape[0] // (4 if self.bidirectional else 2)
        if exact < 1 or self.max_distance <= exact:
            raise OptionError(
                f"RelativeBias(bidirectional={self.bidirectional}, max_distance={self.max_distance}) with {self.table.shape[0]} "
                f"buckets: needs at least {4 if self.bidirectional else 2} buckets and max_distance > {exact}"
            )

    @staticmethod
    def dense(bias: Tensor) -> DenseBias:
        """A bias given element by element, see `DenseBias`."""
        return DenseBias(bias)

    @property
    def heads(self) -> int:
        return self.table.shape[1]

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.table,)

    def replace_tensors(self, tensors: Sequence[Tensor]) -> RelativeBias:
        (table,) = tensors
        return RelativeBias(table, self.bidirectional, self.max_distance)

    def _bucket(self, relative: Tensor) -> Tensor:
        n = self.table.shape[0]
        return t5_bucket(relative, num_buckets=n, bidirectional=self.bidirectional, max_distance=self.max_distance)

    def __call__(self, scores: Tensor, q_pos: Tensor, k_pos: Tensor, heads: Tensor | None = None) -> Tensor:
        table = (self.table if heads is None else self.table[:, heads]).to(scores.dtype)
        tq, tk = q_pos.shape[0], k_pos.shape[0]
        if _consecutive(q_pos) and _consecutive(k_pos):
            # The bias is constant along diagonals: look up tq + tk - 1 values and lay them out as shifted rows.
            low = k_pos[0] - q_pos[-1]
            diagonals = table[self._bucket(torch.arange(tq + tk - 1) + low)].t().contiguous()
            return scores + diagonals.unfold(-1, tk, 1).flip(-2)
        return scores + table[self._bucket(_distance(q_pos, k_pos))].permute(2, 0, 1)

    def __repr__(self) -> str:
        table = list(self.table.shape)
        return f"RelativeBias(table={table}, bidirectional={self.bidirectional}, max_distance={self.max_distance})"


@dataclass(frozen=True, eq=False)
class DenseBias(ScoreMod):
    """`s + bias[..., r, k]` with `bias` `[H|1, Tq, Tk]` or `[B, H|1, Tq, Tk]`; row r is the query at position r + Tk - Tq.

    Positions outside the bias raise ShapeError.
    """

    bias: Tensor

    def __post_init__(self) -> None:
        if self.bias.ndim not in (3, 4):
            raise ShapeError(f"RelativeBias.dense: bias must be [H|1, Tq, Tk] or [B, H|1, Tq, Tk], got {list(self.bias.shape)}")

    @property
    def heads(self) -> int | None:
        return None if self.bias.shape[-3] == 1 else self.bias.shape[-3]

    @property
    def batch(self) -> int | None:
        return self.bias.shape[0] if self.bias.ndim == 4 and self.bias.shape[0] > 1 else None

    def narrow(self, tensors: Sequence[T], start: int, stop: int) -> list[T]:
        return list(tensors) if self.batch is None else [t if t is None else t[start:stop] for t in tensors]

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.bias,)

    def replace_tensors(self, tensors: Sequence[Tensor]) -> DenseBias:
        (bias,) = tensors
        return DenseBias(bias)

    def _index(self, q_pos: Tensor, k_pos: Tensor) -> tuple[slice | Tensor, slice | Tensor]:
        rows, cols = self.bias.shape[-2:]
        return _span(q_pos - (cols - rows), rows, "query"), _span(k_pos, cols, "key")

    def _block(self, tensor: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        row, col = self._index(q_pos, k_pos)
        return tensor[..., row, :][..., col]

    def __call__(self, scores: Tensor, q_pos: Tensor, k_pos: Tensor, heads: Tensor | None = None) -> Tensor:
        block = self._block(self.bias, q_pos, k_pos)
        if heads is not None and block.shape[-3] != 1:
            block = block[..., heads, :, :]
        return scores + block.to(scores.dtype)

    def backward(
        self, scores: Tensor, grad: Tensor, q_pos: Tensor, k_pos: Tensor, heads: Tensor | None, sums: Sequence[Tensor | None]
    ) -> Tensor:
        (total,) = sums
        if total is not None:
            if total.shape[-3] == 1:
                heads = None
            wanted = (*total.shape[:-3], total.shape[-3] if heads is None else len(heads), *grad.shape[-2:])
            piece = grad.sum_to_size(wanted)
            row, col = self._index(q_pos, k_pos)
            if heads is None and isinstance(row, slice) and isinstance(col, slice):
                total[..., row, col].add_(piece)
            else:
                h = torch.arange(total.shape[-3], device=grad.device) if heads is None else heads
                r, c = (_as_index(i, n, grad.device) for i, n in ((row, total.shape[-2]), (col, total.shape[-1])))
                where = (h[:, None, None], r[:, None], c)
                for out, value in zip(total, piece, strict=True) if total.ndim == 4 else ((total, piece),):
                    out.index_put_(where, value.to(out.dtype), accumulate=True)
        return grad

    def __repr__(self) -> str:
        return f"RelativeBias.dense(bias={list(self.bias.shape)})"


def _span(index: Tensor, size: int, what: str) -> slice | Tensor:
    """`index` as a slice where it rises by one, which needs no gather."""
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= size):
        raise ShapeError(
            f"RelativeBias.dense: {what} rows {int(index.min())}..{int(index.max())} asked of a bias that has {size} of them"
        )
    if _consecutive(index):
        return slice(int(index[0]), int(index[0]) + index.numel())
    return index


def _as_index(index: slice | Tensor, size: int, device: torch.device) -> Tensor:
    return torch.arange(*index.indices(size), device=device) if isinstance(index, slice) else index
