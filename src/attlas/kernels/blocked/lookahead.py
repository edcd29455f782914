"""Causal attention with lookahead keys (CASTLE), swept over blocks of queries: O(T^2) time, O(T) memory.

All tensors are [N, T, D] with N = batch times heads, in the computing dtype. M tokens came before: keys, values and lookahead
queries hold M + T tokens, everything else the T new ones. Between two blocks the sweep keeps U [N, M + T, D], what each key has
gathered from the tokens so far. For the block of queries at a ... e - 1, of b tokens:

    G = sigmoid(scale q_u k_u[a:e]^T), where s < j <= s + window          [N, e, b]  what key s gathers from token j of the block
    Z = scale q[a:e] U^T + (scale q[a:e] v_u[a:e]^T, where j <= t) G^T    [N, b, e]  lookahead scores
    out[a:e] = softmax(scale q[a:e] k^T - silu(Z), where s <= t) v        then U += G v_u[a:e]

With a window only the last `window` keys before the block, and the block's own, still gather: rows lo ... e - 1.
The backward pass runs the blocks in reverse, taking G v_u out of U again, so that only the inputs, out, U and the log-sum-exp are
kept. Source: Song et al. 2025, arXiv:2509.07301, Algorithm 1 and its backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attlas.numerics import first_order

BLOCK = 64  # the work inside a block grows with it as that outside does with the head size


@dataclass(frozen=True)
class Block:
    """Queries a ... e - 1 of the new tokens; keys 0 ... end - 1 are in reach, of which lo ... end - 1 gather from the block."""

    a: int
    e: int
    lo: int
    end: int
    window: int | None

    def gathers(self, device: torch.device) -> Tensor:
        """bool [end - lo, b]: s < j (<= s + window)."""
        apart = torch.arange(self.end - (self.e - self.a), self.end, device=device) - torch.arange(
            self.lo, self.end, device=device
        ).unsqueeze(-1)
        return apart > 0 if self.window is None else (apart > 0) & (apart <= self.window)

    def later(self, device: torch.device) -> Tensor:
        """bool [b, b]: j > t."""
        return torch.ones(self.e - self.a, self.e - self.a, dtype=torch.bool, device=device).triu(1)


def blocks(before: int, count: int, window: int | None) -> Iterator[Block]:
    for a in range(0, count, BLOCK):
        e = min(a + BLOCK, count)
        lo = 0 if window is None else max(0, before + a - window)
        yield Block(a, e, lo, before + e, window)


class Sweep:
    """The tensors of one call, and what forward and backward compute alike for a block."""

    def __init__(self, ahead: tuple[Tensor, ...], own: tuple[Tensor, ...], window: int | None) -> None:
        (self.q_u, self.k_u, self.v_u), (self.q, self.k, self.v) = ahead, own
        self.window, self.scale = window, self.q.shape[-1] ** -0.5
        self.before = self.k.shape[1] - self.q.shape[1]

    def blocks(self) -> list[Block]:
        return list(blocks(self.before, self.q.shape[1], self.window))

    def gates(self, b: Block) -> Tensor:
        """G, [N, end - lo, b]."""
        logits = self.q_u[:, b.lo : b.end] @ self.k_u[:, b.a : b.e].mT
        return torch.sigmoid(logits.mul_(self.scale)).masked_fill_(~b.gathers(logits.device), 0.0)

    def asked(self, b: Block) -> Tensor:
        """scale q v_u^T, where j <= t, [N, b, b]."""
        return (self.q[:, b.a : b.e] @ self.v_u[:, b.a : b.e].mT).mul_(self.scale).masked_fill_(b.later(self.q.device), 0.0)

    def scores(self, b: Block, U: Tensor, G: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """(scale q k^T - silu(Z) with -inf at later keys, Z), both [N, b, end]."""
        q = self.q[:, b.a : b.e]
        Z = (q @ U[:, : b.end].mT).mul_(self.scale)
        Z[:, :, b.lo :] += asked @ G.mT
        S = (q @ self.k[:, : b.end].mT).mul_(self.scale) - torch.nn.functional.silu(Z)
        S[:, :, b.end - (b.e - b.a) :].masked_fill_(b.later(q.device), -math.inf)
        return S, Z

    def forward(self, U: Tensor) -> tuple[Tensor, Tensor]:
        """(out, lse); U [N, M + T, D], zeros at the new tokens, is brought up to the last token."""
        out, lse = torch.empty_like(self.q), self.q.new_empty(self.q.shape[:2])
        for b in self.blocks():
            G = self.gates(b)
            S, _ = self.scores(b, U, G, self.asked(b))
            lse[:, b.a : b.e] = S.logsumexp(-1)
            out[:, b.a : b.e] = S.sub_(lse[:, b.a : b.e, None]).exp_() @ self.v[:, : b.end]
            U[:, b.lo : b.end] += G @ self.v_u[:, b.a : b.e]
        return out, lse

    def backward(self, U: Tensor, lse: Tensor, out: Tensor, d_out: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Gradients of (q_u, k_u, v_u, q, k, v) and of the U that the call started from. U is that after the last token."""
        U, dU = U.clone(), torch.zeros_like(U)
        grads = tuple(torch.zeros_like(t) for t in (self.q_u, self.k_u, self.v_u, self.q, self.k, self.v))
        for b in reversed(self.blocks()):
            G, asked = self.gates(b), self.asked(b)
            U[:, b.lo : b.end] -= G @ self.v_u[:, b.a : b.e]
            U[:, self.before + b.a :] = 0.0  # exact, where the subtraction rounds
            dZ = self._through_softmax(b, grads, (U, G, asked), lse, (out, d_out))
            self._through_lookahead(b, grads, (U, G, asked), dZ, dU)
        return grads, dU[:, : self.before]

    def _through_softmax(
        self, b: Block, grads: tuple[Tensor, ...], state: tuple[Tensor, ...], lse: Tensor, outs: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Add to the gradients of q, k and v; returns that of Z."""
        S, Z = self.scores(b, *state)
        out, d_out = (t[:, b.a : b.e] for t in outs)
        P = S.sub_(lse[:, b.a : b.e, None]).exp_()
        grads[5][:, : b.end] += P.mT @ d_out
        dS = P.mul_(d_out @ self.v[:, : b.end].mT - (out * d_out).sum(-1, keepdim=True))
        grads[3][:, b.a : b.e] += dS @ self.k[:, : b.end] * self.scale
        grads[4][:, : b.end] += dS.mT @ self.q[:, b.a : b.e] * self.scale
        gate = torch.sigmoid(Z)
        return dS.neg_() * (gate * (1 + Z * (1 - gate)))

    def _through_lookahead(self, b: Block, grads: tuple[Tensor, ...], state: tuple[Tensor, ...], dZ: Tensor, dU: Tensor) -> None:
        """Add to the gradients of q_u, k_u, v_u and q; dU goes from after the block to before it."""
        (U, G, asked), (dq_u, dk_u, dv_u, dq, _, _) = state, grads
        q, k_u, v_u = self.q[:, b.a : b.e], self.k_u[:, b.a : b.e], self.v_u[:, b.a : b.e]
        near, after = dZ[:, :, b.lo :], dU[:, b.lo : b.end]
        d_asked = (near @ G).masked_fill_(b.later(q.device), 0.0)
        dq[:, b.a : b.e] += (dZ @ U[:, : b.end] + d_asked @ v_u) * self.scale
        dv_u[:, b.a : b.e] += G.mT @ after + d_asked.mT @ q * self.scale
        d_logits = (after @ v_u.mT + near.mT @ asked) * (G * (1 - G)) * self.scale
        dq_u[:, b.lo : b.end] += d_logits @ k_u
        dk_u[:, b.a : b.e] += d_logits.mT @ self.q_u[:, b.lo : b.end]
        dU[:, : b.end] += dZ.mT @ q * self.scale


class _Lookahead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        q_u, k_u, v_u, q, k, v, U, window = args
        U = torch.cat([U, U.new_zeros(q.shape)], 1)
        out, lse = Sweep((q_u, k_u, v_u), (q, k, v), window).forward(U)
        ctx.save_for_backward(q_u, k_u, v_u, q, k, v, U, out, lse)
        ctx.window = window
        ctx.mark_non_differentiable(U)
        return out, U

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Any, *given: Any) -> tuple[Tensor | None, ...]:
        q_u, k_u, v_u, q, k, v, U, out, lse = saved
        grads, dU = Sweep((q_u, k_u, v_u), (q, k, v), ctx.window).backward(U, lse, out, given[0])
        return *grads, dU, None


def lookahead(ahead: tuple[Tensor, ...], own: tuple[Tensor, ...], U: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """ahead = (q_u [N, M + T, D], k_u, v_u [N, T, D]), own = (q [N, T, D], k, v [N, M + T, D]), U [N, M, D] -> (out [N, T, D], U
    after the last token [N, M + T, D]). First-order gradients reach everything but the returned U."""
    return _Lookahead.apply(*ahead, *own, U, window)
