"""Latent attention made of linear maps alone: what a trained softmax layer can be rewritten as."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from attlas.errors import OptionError
from attlas.nn.latent import Attend, MultiHeadLatent, latent_scale
from attlas.numerics import wide_dtype
from attlas.ops.attention import attention
from attlas.positions.rope import Rope


class LinearLatent(MultiHeadLatent):
    """Multi-head latent attention without norms, and with as many shared rotated keys as are asked for.

        c_t = W_a x_t,  r_t,i = rope_t(W_r,i x_t)                    one latent, and rope_keys rotated keys shared by all heads
        k_t,h = [W_k,h c_t ; r_t,1 ; r_t,2 ...],  v_t,h = W_v,h c_t
        q_t,h = [W_q,h x_t ; rope_t(W_qr,h,1 x_t) ; ...]
        y_t = o(softmax_j(scale * q_t,h . k_j,h) v_j,h)

    With rope_keys=1 this is multi-head-latent less its norms and its squeezed queries. The norms are what a trained softmax layer
    cannot be rewritten with: a latent that has been divided by its length is no linear map of x any more.

    kv_lora_rank      width of the latent; qk_nope_head_dim: of a head's key without positions (0 = none)
    qk_rope_head_dim  width of one rotated key
    rope_keys         how many there are, each turned by the same angles; 0 = no positions
    rope              base of the rotation (pairs half a width apart), or a Rope of qk_rope_head_dim channels
    scale             None = (qk_nope_head_dim + qk_rope_head_dim) ** -0.5, times mscale ** 2 under a Yarn with mscale_all_dim
    bias              of the projections from x and of the output: True, False, or "qkv" (not on the output)

    Reads its cache as multi-head-latent does. Cache kv_lora_rank + rope_keys qk_rope_head_dim per token.
    Source: Meng et al. 2025, arXiv 2502.07864, and attlas.nn.convert, which makes it.
    """

    name = "linear-latent"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kv_lora_rank: int = 512,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
        rope_keys: int = 1,
        rope: float | Rope = 10000.0,
        causal: bool = True,
        scale: float | None = None,
        bias: bool | Literal["qkv"] = False,
        attend: Attend = attention,
    ) -> None:
        self.rope_keys, self.rope_width = rope_keys, qk_rope_head_dim
        call = f"{self.name}(dim={dim}, num_heads={num_heads}, rope_keys={rope_keys}, rope={rope}, bias={bias!r})"
        if bias not in (True, False, "qkv") or rope_keys < 0 or qk_rope_head_dim < 2 or qk_rope_head_dim % 2:
            raise OptionError(
                f"{call}: bias must be True, False or 'qkv', rope_keys at least 0, qk_rope_head_dim={qk_rope_head_dim} even"
            )
        if not isinstance(rope, Rope):
            if isinstance(rope, bool) or rope <= 1:
                raise OptionError(f"{call}: the base of the rotation must be above 1")
            rope = Rope(qk_rope_head_dim, float(rope))
        super().__init__(
            dim, num_heads, kv_lora_rank=kv_lora_rank, qk_nope_head_dim=qk_nope_head_dim, v_head_dim=v_head_dim, rope=rope,
            qk_rope_head_dim=rope_keys * qk_rope_head_dim, causal=causal, scale=scale, bias=bias is True, attend=attend,
        )  # fmt: skip
        if scale is None:
            self.scale = latent_scale(qk_nope_head_dim + qk_rope_head_dim, rope)
        del self.kv_a_norm
        self.q_proj = nn.Linear(dim, self.q_proj.out_features, bias=bool(bias))
        self.kv_a_proj = nn.Linear(dim, self.kv_a_proj.out_features, bias=bool(bias))
        self.uses_positions = causal or rope_keys > 0

    def _check_options(self, rope: float | Rope) -> None:
        call = f"{self.name}({self._sizes()}, rope={rope})"
        if min(self.dim, self.num_heads, self.kv_rank, self.v_dim) < 1 or self.nope < 0 or self.nope + self.rotary < 1:
            raise OptionError(f"{call}: every size must be at least 1 (of qk_nope_head_dim and rope_keys, one may be 0)")
        if isinstance(rope, Rope) and rope.head_dim != self.rope_width:
            raise OptionError(f"{call}: the Rope is made for {rope.head_dim} channels, qk_rope_head_dim is {self.rope_width}")

    def _sizes(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, kv_lora_rank={self.kv_rank}, qk_nope_head_dim={self.nope}, "
            f"qk_rope_head_dim={self.rope_width}, v_head_dim={self.v_dim}, rope_keys={self.rope_keys}"
        )

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_nope, q_rope = self.q_proj(x).unflatten(-1, (self.num_heads, -1)).split([self.nope, self.rotary], -1)
        latent, k_rope = self.kv_a_proj(x).split([self.kv_rank, self.rotary], -1)
        if self.rope_keys:
            angles = self.rope.cos_sin(positions, wide_dtype(x.dtype))
            each = (self.rope_keys, self.rope_width)
            k_rope = self.rope.rotate(k_rope.unflatten(-1, each), *angles).flatten(-2)
            q_rope = self.rope.rotate(q_rope.unflatten(-1, each).flatten(-3, -2), *angles).reshape(q_rope.shape)
        return q_nope, q_rope, torch.cat([latent, k_rope], -1)
