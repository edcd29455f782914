"""Multi-resolution attention against transformers' MRA and against a loop over pairs from the paper's equations, in fp64.

transformers computes MRA with three CUDA kernels and returns zeros without them. The kernels are products, sums and maxima over
the blocks of a list; `Products` computes these with dense arrays, and all the rest (means, choice of blocks, how the two
resolutions are put together) is theirs.
"""

from __future__ import annotations

import math

import pytest
import torch
from same_weights import EXACT, FP32_INSIDE, Pair, close, inputs, lively
from torch import Tensor, nn

from attlas.catalogue.index import build
from hf_models import transformers

DIM, HEADS, HEAD, BLOCK = 66, 2, 33, 32


class Products:
    """A list of blocks of a matrix is [G, N, 32 keys, 32 queries], with indices = query block * key blocks + key block."""

    @staticmethod
    def mm_to_sparse(query: Tensor, key: Tensor, indices: Tensor) -> Tensor:
        """query, key [G, blocks, D, 32]."""
        whole = torch.einsum("gxdq,gydk->gxykq", query, key).flatten(1, 2)
        return torch.stack([row[at.long()] for row, at in zip(whole, indices, strict=True)])

    @staticmethod
    def sparse_dense_mm(sparse: Tensor, indices: Tensor, dense: Tensor, query_blocks: int) -> Tensor:
        """dense [G, key blocks, D, 32 keys] -> [G, query blocks, D, 32 queries]."""
        g = len(indices)
        whole = sparse.new_zeros(g, query_blocks * dense.shape[1], *sparse.shape[2:])
        for i in range(g):
            whole[i, indices[i].long()] = sparse[i]
        return torch.einsum("gxykq,gydk->gxdq", whole.unflatten(1, (query_blocks, -1)), dense)

    @staticmethod
    def index_max(values: Tensor, indices: Tensor, query_blocks: int, key_blocks: int) -> tuple[Tensor, Tensor]:
        """values [G, 32, N] -> the maximum of each query [G, query blocks * 32], and that of each entry's queries [G, 32, N]."""
        block = (indices.long() // key_blocks)[:, None].expand_as(values)
        top = values.new_full((*values.shape[:2], query_blocks), -1e4).scatter_reduce(2, block, values, "amax")
        return top.transpose(1, 2).flatten(1), top.gather(2, block)


@pytest.mark.parametrize(
    ("mode", "per_row", "first", "diagonal"),
    [("full", 1, 0, 0), ("full", 2, 0, 0), ("sparse", 2, 0, 0), ("full", 4, 1, 1), ("sparse", 4, 0, 3)],
)
@pytest.mark.parametrize("length", [160, 153])
def test_transformers(monkeypatch: pytest.MonkeyPatch, mode: str, per_row: int, first: int, diagonal: int, length: int) -> None:
    transformers()
    from transformers.models.mra import modeling_mra as mra

    monkeypatch.setattr(mra, "mra_cuda_kernel", Products)
    settings = transformers().MraConfig(hidden_size=DIM, num_attention_heads=HEADS, max_position_embeddings=160)
    theirs, out = lively(mra.MraSelfAttention(settings)), lively(nn.Linear(DIM, DIM), seed=3)
    for p in theirs.parameters():
        p.data.mul_(0.5)
    extra = -length % BLOCK
    mask = (torch.arange(length + extra) < length).double().expand(2 * HEADS, -1)

    def run(x: Tensor) -> Tensor:
        """Their `forward` rounds to fp32; this is what it calls, in fp64."""
        x = nn.functional.pad(x, (0, 0, 0, extra))
        q, k, v = (p(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for p in (theirs.query, theirs.key, theirs.value))
        y = mra.mra2_attention(
            q, k, v, mask, (length + extra) // BLOCK * per_row, mode,
            initial_prior_first_n_blocks=first, initial_prior_diagonal_n_blocks=diagonal,
        )  # fmt: skip
        return out(y.transpose(1, 2).flatten(-2)[:, :length])

    options = {"coarse": mode == "full", "ranking": "relative", "first": first, "diagonal": diagonal, "bias": True}
    pair = Pair(build("multi-resolution", DIM, HEADS, block=BLOCK, blocks_per_row=per_row, head_dim=HEAD, **options))
    pair.linear(theirs.query, "q_proj").linear(theirs.key, "k_proj").linear(theirs.value, "v_proj").linear(out, "o_proj")
    if mode == "sparse":  # then a bias of all keys cancels
        pair.without_effect("k_proj.bias")
    pair.must_agree(run, pair.mine, inputs(2, length, DIM) * 0.5, atol=FP32_INSIDE * 10)


def chosen(best: dict[tuple[int, int], float], count: int, relative: bool) -> set[tuple[int, int]]:
    """The pairs of blocks that are popped from the list of all, largest first."""
    if relative:
        top = {x: max(s for (row, _), s in best.items() if row == x) for x, _ in best}
        best = {(x, y): s - top[x] for (x, y), s in best.items()}
    return set(sorted(best, key=lambda pair: best[pair])[-count:])


@pytest.mark.parametrize("length", [5, 24, 29])
@pytest.mark.parametrize("rules", [(True, False, 1), (True, False, 2), (False, True, 2), (True, True, 1)])
def test_the_equations_of_the_paper(rules: tuple[bool, bool, int], length: int) -> None:
    """A_ij = exp(mu), mu the mean of the products over the smallest square of J around (i, j); y = (A V)_i / (A 1)_i."""
    coarse, relative, per_row = rules
    block, ranking = 4, "relative" if relative else "absolute"
    options = {"coarse": coarse, "ranking": ranking, "head_dim": 6, "block": block, "blocks_per_row": per_row}
    mine = lively(build("mra", 22, 2, **options))
    blocks = [range(first, min(first + block, length)) for first in range(0, length, block)]

    def loops(x: Tensor) -> Tensor:
        q, k, v = (getattr(mine, f"{name}_proj")(x).unflatten(-1, (2, 6)) for name in "qkv")
        rows = []
        for b in range(len(x)):
            heads = []
            for h in range(2):
                products = q[b, :, h] @ k[b, :, h].T / math.sqrt(6)
                mu = {
                    (m, n): torch.stack([products[i, j] for i in rows_of for j in keys_of]).mean()
                    for m, rows_of in enumerate(blocks)
                    for n, keys_of in enumerate(blocks)
                }
                fine = chosen({pair: float(s.detach()) for pair, s in mu.items()}, per_row * len(blocks), relative)
                A = torch.zeros(length, length, dtype=x.dtype)
                for i in range(length):
                    for j in range(length):
                        pair = (i // block, j // block)
                        if pair in fine or coarse:
                            A[i, j] = torch.exp(products[i, j] if pair in fine else mu[pair])
                heads.append(A @ v[b, :, h] / A.sum(1, keepdim=True))
            rows.append(torch.cat(heads, -1))
        return mine.o_proj(torch.stack(rows))

    found = []
    for run in (mine, loops):
        leaf = (inputs(2, length, 22) * 0.5).requires_grad_()
        y = run(leaf)
        found.append([y, *torch.autograd.grad((y * inputs(*y.shape, seed=9)).sum(), [leaf, *mine.parameters()])])
    for got, want in zip(*found, strict=True):
        close(got, want, EXACT)
        assert want.abs().max() > 1e-6
