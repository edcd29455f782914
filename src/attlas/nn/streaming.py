"""StreamingLLM: attention sinks and a recent window, with positions counted inside the cache."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from attlas.errors import OptionError
from attlas.masks.leaves import Causal, Prefix, Sinks, Window
from attlas.nn.attention import Angles, Attend, Attention, Read
from attlas.ops.attention import attention
from attlas.ops.merge import merge
from attlas.positions.rope import Rope
from attlas.shapes import AuxRequest


class StreamingAttention(Attention):
    """Softmax over the first `sinks` tokens and the last `window` tokens (itself included), each key once.

    With sink_positions="cache" rotary distances are those inside the cache, as in the paper: query i sees a sink j at distance
    min(i, sinks + window - 1) - j and a window key j at distance i - j. Keys are rotated once, at their absolute position; the
    queries are rotated twice (for the sinks and for the window) and the two softmaxes are joined by their log-sum-exp, so that
    a prefill and a decode compute the same function. With "absolute" the sinks keep their true distance i - j.
    Cost: 4 dim (window + sinks) flops per token; cache sinks + window tokens, however long the stream.
    Source: Xiao et al. 2023, arXiv 2309.17453.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int,
        sinks: int = 4,
        sink_positions: Literal["cache", "absolute"] = "cache",
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: bool | float | Rope = True,
        scale: float | None = None,
        bias: bool | Literal["qkv"] = False,
        qk_norm: bool = False,
        attend: Attend = attention,
    ) -> None:
        options = f"window={window}, sinks={sinks}, sink_positions={sink_positions!r}, rope={rope}"
        call = f"streaming(dim={dim}, num_heads={num_heads}, {options})"
        if window < 1 or sinks < 0:
            raise OptionError(f"{call}: window must be at least 1 and sinks at least 0")
        if sink_positions not in ("cache", "absolute"):
            raise OptionError(f"{call}: sink_positions must be 'cache' or 'absolute'")
        if rope is False and sink_positions == "cache":
            raise OptionError(
                f"{call}: positions inside the cache need rotary positions; pass rope, or sink_positions='absolute'"
            )
        recent = Causal() & Window.last(window)
        super().__init__(
            dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            mask=Causal() & (Window.last(window) | Sinks(sinks)) if sinks else recent,
            rope=rope,
            scale=scale,
            bias=bias,
            qk_norm=qk_norm,
            attend=attend,
        )
        self.window, self.sinks, self.sink_positions = window, sinks, sink_positions
        self._recent, self._first = recent & ~Prefix(sinks), Causal() & Prefix(sinks)

    def _combine(self, q: Tensor, positions: Tensor, angles: Angles, read: Read) -> Tensor:
        if self.sink_positions == "absolute" or not self.sinks:
            return super()._combine(q, positions, angles, read)
        want = AuxRequest(lse=True)
        last = self.sinks + self.window - 1
        parts = [
            read(self._rotate(q, self._angles(positions.clamp(max=last), q)), self._first, want),
            read(self._rotate(q, angles), self._recent, want),
        ]
        return merge([(out, aux.lse) for out, aux in parts])[0].to(q.dtype)
