"""The spelling of flash_attn.flash_attn_func."""

from __future__ import annotations

from torch import Tensor

from attlas.errors import OptionError, UnsupportedError
from attlas.masks import Causal, Mask, Window
from attlas.ops.attention import attention
from attlas.scores import Alibi, ScoreMod, Softcap
from attlas.shapes import describe


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """`ops.attention` in flash-attn's spelling: q [B, Tq, H, D], k and v [B, Tk, Hkv, D] -> [B, Tq, H, D]. Any dtype, any device.

    causal        aligned to the end
    window_size   (left, right) counts of other keys, -1 = unlimited; with causal the right side is 0
    softcap       > 0: cap * tanh(score / cap), before the bias
    alibi_slopes  [H]: adds -slope |i + Tk - Tq - j|; slopes per batch row are not supported
    dropout_p     must be 0

    A query that may attend to nothing gives 0. Raises ShapeError, OptionError, UnsupportedError.
    """
    call = f"flash_attn_func({describe(q=q, k=k, v=v, alibi_slopes=alibi_slopes)}, causal={causal}, window_size={window_size})"
    if dropout_p:
        raise UnsupportedError(f"{call}: dropout_p={dropout_p}: attention weights are never dropped here; pass 0")
    if softcap < 0 or len(window_size) != 2 or any(n < -1 for n in window_size):
        raise OptionError(f"{call}: window_size is (left, right) with -1 for unlimited, softcap={softcap} at least 0")
    if alibi_slopes is not None and alibi_slopes.dim() != 1:
        raise UnsupportedError(f"{call}: alibi_slopes must be [H]; slopes that differ by batch row are not supported")
    left, right = (None if n == -1 else n for n in window_size)
    mask: Mask | None = Causal() if causal else None
    if left is not None or right is not None:
        window = Window(left, right)
        mask = window if mask is None else mask & window
    mods: list[ScoreMod] = [Softcap(softcap)] if softcap else []
    mods += [] if alibi_slopes is None else [Alibi(alibi_slopes)]
    score_mod = None if not mods else mods[0] if len(mods) == 1 else mods[0] >> mods[1]
    return attention(q, k, v, mask=mask, score_mod=score_mod, scale=softmax_scale)
