"""Routing attention: clusters whose means are learned online pick the tokens that attend to each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from attlas.errors import OptionError
from attlas.nn.reformer import HashMixer
from attlas.ops.cluster import nearest_mean, routed_attention
from attlas.ops.lsh import Causal, lsh_attention
from attlas.reference import content as truth


class Routing(HashMixer):
    """Routing attention: each cluster takes its w nearest queries and keys, which attend to each other with softmax.

    q and k are layer-normed without scale and shift; near = largest product with the mean of the cluster, which has length 1. A
    token taken by several clusters gets the mean of their results, one taken by none gets 0.

    clusters  per head
    window    w, queries and keys a cluster takes; None = ceil(T / clusters), so that together they take as many as there are
    decay     of the means: in training mode every forward moves each mean towards the mean of the queries and keys nearest to it,
              mean <- unit(decay mean + (1 - decay) unit(mean of members)); a mean without members stays
    causal    False; "content-leaks": the paper's language model, queries = keys, keys j <= i inside a cluster. Which tokens a
              cluster takes depends on later ones: it cannot decode, and losses measured with it flatter. True (not in the paper):
              queries = keys, and each token attends to the last `window` tokens, itself included, whose nearest mean is its own;
              no later token changes that, nobody gets 0, and it decodes
    seed      of the first means

    Under activation checkpoints (torch.utils.checkpoint, attlas.nn.reversible) the means learn once a step, and the layer is
    computed again with those of its latest forward. A copy of the mixer in another process learns from its own tokens:
    DistributedDataParallel gives all the means of rank 0.

    Positions enter through the order of tokens alone. Cost: 2 T clusters inner flops for each of q and k, and 4 clusters w^2
    inner (causal=True: 4 T w inner). Source: Roy et al. 2021, arXiv 2003.05997.
    """

    name = "routing"
    own = "always"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        clusters: int = 16,
        window: int | None = None,
        decay: float = 0.999,
        causal: Causal = False,
        seed: int = 0,
        scale: float | None = None,
        head_dim: int | None = None,
    ) -> None:
        call = (
            f"routing(dim={dim}, num_heads={num_heads}, clusters={clusters}, window={window}, decay={decay}, causal={causal!r})"
        )
        super().__init__(dim, num_heads, head_dim, causal, scale, call)
        if clusters < 1 or (window is not None and window < 1) or not 0 <= decay <= 1:
            raise OptionError(f"{call}: clusters and window must be at least 1, decay between 0 and 1")
        if causal not in (False, True, "content-leaks"):
            raise OptionError(f"{call}: causal must be False, True or 'content-leaks'")
        if causal is True and window is None:
            raise OptionError(f"{call}: causal=True needs a window: one made from the length would depend on later tokens")
        self.clusters, self.size, self.decay = clusters, window, decay
        self.window = window or 0
        inner = num_heads * self.head_dim
        self.k_proj = nn.Linear(dim, inner, bias=False) if causal is False else None
        drawn = torch.randn(
            num_heads, clusters, self.head_dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        self.means: Tensor
        self._before: Tensor | None = None  # the means before the latest `learn`
        self.register_buffer("means", functional.normalize(drawn, dim=-1).to(torch.get_default_dtype()))

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = functional.layer_norm(self._heads(self.q_proj(x)), (self.head_dim,))
        k = q if self.k_proj is None else functional.layer_norm(self._heads(self.k_proj(x)), (self.head_dim,))
        return q, k, self._heads(self.v_proj(x))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v = self._qkv(x)
        return q, k, v, nearest_mean(q, self._present())[..., None]

    def mix_rows(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.causal:
            q, k, v, hashes = self.encode(x)
            if self.impl == "reference":
                out = truth.reformer(q, k, v, hashes, chunk=self.window, causal=True, own="always", scale=self.scale)
            else:
                out = lsh_attention(
                    q, k, v, hashes, chunk=self.window, causal=True, own="always", scale=self.scale, impl=self.impl
                )
        else:
            q, k, v = self._qkv(x)
            window, left_to_right = self._window(x.shape[1]), self.order == "content-leaks"
            if self.impl == "reference":
                out = truth.routing(q, k, v, self._present(), window=window, causal=left_to_right, scale=self.scale)
            else:
                out = routed_attention(
                    q, k, v, self._present(), window=window, causal=left_to_right, scale=self.scale, impl=self.impl
                )
        if self.training and not _recomputing():
            self.learn(q, k)
        return self.o_proj(out.flatten(-2))

    def _present(self) -> Tensor:
        """The means to choose with: where a checkpoint computes a forward again, those that it had the first time."""
        return self.means if self._before is None or not _recomputing() else self._before

    def _window(self, seq_len: int) -> int:
        return min(seq_len, -(-seq_len // self.clusters) if self.size is None else self.size)

    @torch.no_grad()
    def learn(self, q: Tensor, k: Tensor) -> None:
        """Move the means towards the tokens q, k [B, T, H, D] that are nearest to them (see `decay`)."""
        if not torch.compiler.is_compiling():
            self._before = self.means.clone()
        h, c, d = self.means.shape
        sums = self.means.new_zeros(h * c, d)
        for x in (q,) if k is q else (q, k):
            rows = nearest_mean(x, self.means) + torch.arange(h, device=x.device) * c
            sums.index_add_(0, rows.flatten(), functional.normalize(x, dim=-1).reshape(-1, d).to(sums.dtype))
        towards = functional.normalize(sums.view(h, c, d), dim=-1)
        moved = functional.normalize(self.decay * self.means + (1 - self.decay) * towards, dim=-1)
        self.means.copy_(torch.where(towards.any(-1, keepdim=True), moved, self.means))

    def flops(self, seq_len: int) -> int:
        inner = self.num_heads * self.head_dim
        if self.causal:
            pairs, choices = seq_len * min(self.window, seq_len), 1
        else:
            pairs, choices = self.clusters * self._window(seq_len) ** 2, 1 if self.k_proj is None else 2
        projections = self._projection_flops(seq_len) + (0 if self.k_proj is None else 2 * seq_len * self.dim * inner)
        return projections + 2 * seq_len * self.clusters * inner * choices + 4 * pairs * inner

    def extra_repr(self) -> str:
        shown = f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, clusters={self.clusters}"
        return f"{shown}, window={self.size}, decay={self.decay}, causal={self.order!r}, impl={self.impl}"


def _recomputing() -> bool:
    """Whether this runs inside of a backward pass, as the forward of a checkpoint or of a reversible layer does there."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
