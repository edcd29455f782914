"""Products in which 0 * NaN is 0, for tiles where some pairs are masked and some values are not finite."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_product(weights: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """out[n, i] = sum over the j with seen[i, j] of weights[n, i, j] * values[n, j].

    weights [N, I, J], zero where not seen; values [N, J, C]; seen bool [I, J]. Rows of `values` that are finite go through one
    product; the others are added one by one to the rows that see them.
    """
    bad = ~values.isfinite().all(-1)  # [N, J]
    out = torch.bmm(weights, values.masked_fill(bad[..., None], 0.0))
    for j in (bad.any(0) & seen.any(0)).nonzero().flatten().tolist():
        term = weights[:, :, j, None] * values[:, j, None, :]
        out += term.masked_fill_(~(seen[:, j] & bad[:, j, None])[..., None], 0.0)
    return out
