"""The linear family against transformers' layers with the same weights: Gated DeltaNet (Qwen3-Next), Mamba-2, RWKV-4."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attlas.catalogue.index import build
from attlas.kernels.blocked.wkv import wkv
from attlas.nn.delta import GatedDeltaNet
from attlas.nn.mamba2 import Mamba2
from attlas.nn.rwkv import Rwkv4
from attlas.ops.scan import scan
from attlas.testing.inputs import randn
from attlas.testing.subject import seeded

T = 29
CLOSE = {"rtol": 1e-4, "atol": 3e-5}  # theirs and ours in fp32


def _gradients(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y, x, randn(*y.shape, seed=9, dtype=y.dtype))[0]


@pytest.mark.parametrize("key_heads", [2, 4])
def test_gated_deltanet_equals_qwen3_next(key_heads: int) -> None:
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    heads, head_dim, head_dim_v, dim = 4, 6, 10, 22
    config = Qwen3NextConfig(
        hidden_size=dim, linear_num_value_heads=heads, linear_num_key_heads=key_heads, linear_key_head_dim=head_dim,
        linear_value_head_dim=head_dim_v, linear_conv_kernel_dim=4, num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = seeded(Qwen3NextGatedDeltaNet(config, layer_idx=0), torch.float32)
    ours = GatedDeltaNet(dim, heads, num_key_heads=key_heads, head_dim=head_dim, head_dim_v=head_dim_v).eval()
    weights = theirs.state_dict()
    group = heads // key_heads
    # theirs interleaves, per key head: its q, its k, the v and then the z of the value heads that read it
    qkvz = weights["in_proj_qkvz.weight"].view(key_heads, -1, dim)
    q, k, v, z = qkvz.split([head_dim, head_dim, group * head_dim_v, group * head_dim_v], 1)
    beta, decay = weights["in_proj_ba.weight"].view(key_heads, -1, dim).split([group, group], 1)
    ours.load_state_dict(
        {
            "qkv_proj.weight": torch.cat([part.reshape(-1, dim) for part in (q, k, v)]),
            "z_proj.weight": z.reshape(-1, dim),
            "beta_proj.weight": beta.reshape(-1, dim),
            "decay_proj.weight": decay.reshape(-1, dim),
            "conv.weight": weights["conv1d.weight"][:, 0],
            "log_rate": weights["A_log"],
            "dt_bias": weights["dt_bias"],
            "norm.weight": weights["norm.weight"],
            "o_proj.weight": weights["out_proj.weight"],
        }
    )
    x = randn(2, T, dim, dtype=torch.float32).requires_grad_()
    want, got = theirs(x), ours(x)
    torch.testing.assert_close(got, want, **CLOSE)
    torch.testing.assert_close(_gradients(got, x), _gradients(want, x), **CLOSE)


@pytest.mark.parametrize("gated", [True, False])
def test_delta_rule_equals_qwen3_next_kernels(gated: bool) -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule

    q, k, v = (randn(2, T, 3, n, seed=i, dtype=torch.float32) for i, n in enumerate((5, 5, 7)))
    k = torch.nn.functional.normalize(k, dim=-1)
    beta = randn(2, T, 3, seed=4, dtype=torch.float32).sigmoid()
    decay = -randn(2, T, 3, seed=5, dtype=torch.float32).abs() * gated
    state = randn(2, 3, 5, 7, seed=6, dtype=torch.float32)
    got = scan(q, k, v, delta=beta, log_decay=decay, initial_state=state)
    for theirs in (torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule):
        want, _ = theirs(q, k, v, g=decay, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=False)
        torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_equals_transformers(groups: int) -> None:
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    dim, heads, state_dim = 14, 4, 5
    config = Mamba2Config(
        hidden_size=dim, num_heads=heads, head_dim=7, state_size=state_dim, n_groups=groups, expand=2, conv_kernel=4,
        chunk_size=8,
        num_hidden_layers=1, rms_norm=True,
    )  # fmt: skip
    theirs = seeded(Mamba2Mixer(config, layer_idx=0), torch.float32)
    ours = Mamba2(dim, heads, state_dim=state_dim, num_groups=groups, eps=theirs.norm.variance_epsilon).eval()
    names = {
        "in_proj.weight": "in_proj.weight",
        "conv.bias": "conv1d.bias",
        "log_rate": "A_log",
        "dt_bias": "dt_bias",
        "skip": "D",
    }
    names |= {"norm_weight": "norm.weight", "o_proj.weight": "out_proj.weight"}
    weights = theirs.state_dict()
    ours.load_state_dict({o: weights[t] for o, t in names.items()} | {"conv.weight": weights["conv1d.weight"][:, 0]})
    x = randn(2, T, dim, dtype=torch.float32).requires_grad_()
    want, got = theirs(x), ours(x)
    torch.testing.assert_close(got, want, **CLOSE)
    torch.testing.assert_close(_gradients(got, x), _gradients(want, x), **CLOSE)


def test_rwkv4_equals_transformers() -> None:
    from transformers.models.rwkv.configuration_rwkv import RwkvConfig
    from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention, rwkv_linear_attention_cpu

    dim = 23
    theirs = seeded(RwkvSelfAttention(RwkvConfig(hidden_size=dim, attention_hidden_size=dim, num_hidden_layers=1)), torch.float32)
    with torch.no_grad():  # theirs come uninitialised
        theirs.time_decay.copy_(randn(dim, seed=21))
        theirs.time_first.copy_(randn(dim, seed=22))
        for i, mix in enumerate((theirs.time_mix_key, theirs.time_mix_value, theirs.time_mix_receptance)):
            mix.copy_(randn(1, 1, dim, seed=23 + i).sigmoid())
    ours = Rwkv4(dim).eval()
    weights = theirs.state_dict()
    names = {
        "mix_r": "time_mix_receptance",
        "mix_k": "time_mix_key",
        "mix_v": "time_mix_value",
        "decay": "time_decay",
        "bonus": "time_first",
    }
    names |= {"r_proj.weight": "receptance.weight", "k_proj.weight": "key.weight", "v_proj.weight": "value.weight"}
    names["o_proj.weight"] = "output.weight"
    ours.load_state_dict({o: weights[t].reshape(ours.state_dict()[o].shape) for o, t in names.items()})
    x = randn(2, T, dim, dtype=torch.float32).requires_grad_()
    want, got = theirs(x)[0], ours(x)
    torch.testing.assert_close(got, want, **CLOSE)
    torch.testing.assert_close(_gradients(got, x), _gradients(want, x), **CLOSE)

    k, v, decay, bonus = 5 * randn(2, T, dim), randn(2, T, dim, seed=1), randn(dim, seed=2), randn(dim, seed=3)
    want, _ = rwkv_linear_attention_cpu(decay, bonus, k, v)
    start = torch.zeros(2, dim, dtype=torch.float64), torch.full((2, dim), float("-inf"), dtype=torch.float64)
    torch.testing.assert_close(wkv(k, v, -decay.exp(), bonus, *start, None)[0], want.double(), **CLOSE)


def test_performer_converges_to_softmax_attention() -> None:
    """With small queries and keys, more random features come closer to exact attention, at about the rate 1 / sqrt(features)."""
    x = 0.4 * randn(1, 31, 24)
    exact = seeded(build("causal", 24, 2, rope=False), torch.float64)
    errors = []
    for count in (16, 256, 4096):
        per_draw = []
        for seed in range(3):
            estimate = build("performer", 24, 2, num_features=count, seed=seed, eps=0.0).double()
            estimate.load_state_dict(exact.state_dict() | {"projection": estimate.projection})
            per_draw.append(((estimate(x) - exact(x)).norm() / exact(x).norm()).item())
        errors.append(sum(per_draw) / 3)
    assert errors[0] > 2 * errors[1] > 4 * errors[2], errors
    assert errors[2] < 0.02, errors
