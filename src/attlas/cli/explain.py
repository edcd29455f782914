"""`attlas explain`: which implementation would run for a call of this shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attlas.cli.options import from_dataclass
from attlas.cli.output import write_json
from attlas.cli.parse import parse_mask
from attlas.errors import OptionError, UnsupportedError
from attlas.registry import suggest
from attlas.shapes import AuxRequest

if TYPE_CHECKING:
    from torch import Tensor

SIZES = ("batch", "q_len", "k_len", "heads", "kv_heads", "head_dim")
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

    def __post_init__(self) -> None:
        if self.shape and len(self.shape) != 4:
            raise OptionError(f"--shape {','.join(map(str, self.shape))}: it is B,T,H,D, four numbers")
        sizes = {"shape": min(self.shape, default=1), **{name: getattr(self, name) for name in SIZES}}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise OptionError(f"--{name.replace('_', '-')} {size}: it must be at least 1")
        if self.dtype not in DTYPES:
            raise OptionError(f"--dtype {self.dtype}: {suggest(self.dtype, DTYPES)}")

    @property
    def q(self) -> tuple[int, ...]:
        return self.shape or (self.batch, self.q_len, self.heads, self.head_dim)

    @property
    def k(self) -> tuple[int, ...]:
        batch, q_len, heads, head_dim = self.q
        return batch, self.k_len or q_len, self.kv_heads or heads, head_dim


def build() -> Callable[..., None]:
    return from_dataclass(lambda: Question, answer)()


def answer(question: Question, as_json: bool) -> None:
    from attlas.ops.explain import explain

    q, k = (placeholder(shape, question) for shape in (question.q, question.k))
    mask = None if question.mask is None else parse_mask(question.mask)
    aux = AuxRequest(lse=True) if question.lse else None
    found = explain("attention", q, k, mask=mask, impl=question.impl, return_aux=aux)
    if as_json:
        write_json(found.to_dict())
    else:
        print(found)


def placeholder(shape: tuple[int, ...], question: Question) -> Tensor:
    """A tensor of that shape on the asked device, made of one number."""
    import torch

    try:
        return torch.zeros(1, dtype=getattr(torch, question.dtype), device=question.device).expand(shape)
    except (RuntimeError, AssertionError) as error:  # torch's words for an unknown and for an absent device
        raise UnsupportedError(f"--device {question.device}: {str(error).splitlines()[0]}") from None
