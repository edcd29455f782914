"""Decode over the storage of a cache: the newest tokens of sequences of any lengths in one kernel call, without copying keys.

A token's result depends on its own sequence alone, to the bit, so it does not matter which sequences decode together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attlas.kernels.cpu import attention as cpu
from attlas.kernels.cpu.launch import CODES, DTYPES, Visible, decode
from attlas.kernels.cpu.library import MAX_DIM, load
from attlas.masks.expr import Mask
from attlas.ops.merge import merge
from attlas.scores import Alibi, Chain, ScoreMod, Softcap


@dataclass(frozen=True, eq=False)
class DecodeRule:
    """What of a call is the same for all sequences, in the kernel's terms."""

    visible: Visible
    softcap: float
    alibi: Tensor | None
    scale: float
    sink: Tensor | None


def rule_for(
    q: Tensor, *, mask: Mask | None, score_mod: ScoreMod | None, scale: float | None, sink: Tensor | None, impl: str
) -> DecodeRule | None:
    """How the kernel would run q [T, H, D]; None when it cannot, or when another implementation is asked for."""
    if impl not in ("auto", "cpu") or torch.compiler.is_compiling() or q.device.type != "cpu" or load() is None:
        return None
    visible, mods = cpu.visible(mask), _mods(score_mod)
    if visible is None or mods is None or q.dtype not in DTYPES or q.shape[-1] > MAX_DIM:
        return None
    softcap, alibi = mods
    grads = [q.requires_grad, sink is not None and sink.requires_grad, alibi is not None and alibi.requires_grad]
    if torch.is_grad_enabled() and any(grads):
        return None
    return DecodeRule(
        visible,
        softcap,
        None if alibi is None else alibi.detach().float().contiguous(),
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        None if sink is None else sink.detach().float().contiguous(),
    )


def _mods(score_mod: ScoreMod | None) -> tuple[float, Tensor | None] | None:
    """(cap, slopes): a soft cap, then ALiBi, either or none; None for anything else."""
    links = () if score_mod is None else score_mod.mods if isinstance(score_mod, Chain) else (score_mod,)
    cap, slopes = 0.0, None
    for link in links:
        if isinstance(link, Softcap) and not cap and slopes is None:
            cap = float(link.cap)
        elif isinstance(link, Alibi) and slopes is None:
            slopes = link.slopes
        else:
            return None
    return cap, slopes


def readable(tensors: tuple[Tensor, ...], scales: tuple[Tensor, ...], dtype: torch.dtype) -> bool:
    """Whether the kernel reads stored keys and values for queries of `dtype`: of the same dtype, or 8-bit numbers with scales."""
    held = CODES if scales else (dtype,)
    return len(tensors) == 2 and all(t.dtype in held and t.shape[-1] <= MAX_DIM for t in tensors)


def decode_pages(
    q: Tensor, pages: tuple[Tensor, ...], block_table: Tensor, lengths: tuple[int, ...], rule: DecodeRule
) -> tuple[Tensor, Tensor]:
    """q [N, n, H, D]: the last n of lengths[i] tokens of each sequence; pages: keys and values [P, page_size, Hkv, D | Dv], and
    where they are 8-bit numbers the scales fp32 [P, page_size, Hkv] of both; block_table int32 [N, blocks]
    -> out [N, n, H, Dv], lse fp32 [N, n, H]."""
    k, v, *scales = pages
    return decode(
        q,
        k,
        v,
        lengths,
        rule.visible,
        rule.scale,
        block_table=block_table,
        softcap=rule.softcap,
        alibi=rule.alibi,
        sink=rule.sink,
        scales=tuple(scales),
    )


# Reading a prefix once for all pays from about here on: below, two kernel calls and a merge cost more than the keys.
CASCADE_ROWS, CASCADE_TOKENS = 2, 256


def shared_tokens(block_table: Tensor, page_size: int, lengths: tuple[int, ...], n: int, rule: DecodeRule) -> int:
    """Leading tokens that all sequences hold in the same pages, before the n newest tokens of each; 0 where a cascade does not
    pay, or where the rule tells those tokens apart (a window, sinks, ALiBi)."""
    see = rule.visible
    if len(lengths) < CASCADE_ROWS or see.left is not None or see.sinks or rule.alibi is not None:
        return 0
    blocks = max(0, min(lengths) - n) // page_size
    differ = (block_table[:, :blocks] != block_table[:1, :blocks]).any(0)
    shared = (int(differ.to(torch.int8).argmax()) if bool(differ.any()) else blocks) * page_size
    return shared if shared >= CASCADE_TOKENS else 0


def cascade_pages(
    q: Tensor, pages: tuple[Tensor, ...], block_table: Tensor, lengths: tuple[int, ...], rule: DecodeRule, shared: int
) -> tuple[Tensor, Tensor]:
    """`decode_pages` with the first `shared` tokens (whole pages, the same for all) read once for all queries, and merged with
    what each sequence has of its own. Equal up to rounding. Bytes read: the prefix, and each tail."""
    rows, n = q.shape[:2]
    blocks = shared // pages[0].shape[1]
    together = q.flatten(0, 1)[None]
    prefix_rule = replace(rule, visible=Visible(causal=False), sink=None)
    out, lse = decode_pages(together, pages, block_table[:1, :blocks], (shared,), prefix_rule)
    prefix = out[0].unflatten(0, (rows, n)), lse[0].unflatten(0, (rows, n))
    own = tuple(n - shared for n in lengths)
    return merge([prefix, decode_pages(q, pages, block_table[:, blocks:], own, rule)])
