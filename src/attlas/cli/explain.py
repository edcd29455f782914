"""`attlas explain`: which implementation would run for a call of this shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attlas.cli.options import from_dataclass

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Question:
    """A call of attention, without its tensors.

    shape      q as B,T,H,D in one go; replaces --batch, --q-len, --heads and --head-dim
    batch      batch size
    q_len      queries
    k_len      keys (default: as many as queries)
    heads      query heads
    kv_heads   key/value heads (default: as many as query heads)
    head_dim   size of a head
    dtype      of q, k and v: float32, bfloat16, float16 or float64
    mask       such as 'Causal() & Window.last(64)'
    device     where the tensors would be
    lse        whether the log-sum-exp is wanted too
    impl       ask for one implementation; it runs or says why not
    """

    shape: tuple[int, ...] = ()
    batch: int = 1
    q_len: int = 1024
    k_len: int | None = None
    heads: int = 8
    kv_heads: int | None = None
    head_dim: int = 64
    dtype: str = "float32"
    mask: str | None = None
    device: str = "cpu"
    lse: bool = False
    impl: str = "auto"


def build() -> Callable[..., None]:
    return from_dataclass(lambda: Question, answer)()
