"""Convolution and attention in one block: the modules against SeamlessM4T's and against loops over tokens and channels, the whole
block against transformers' attention beside them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attlas.catalogue.index import build
from attlas.errors import OptionError
from attlas.nn.conv_hybrid import ConvHybrid, ConvModule
from attlas.nn.recurrent import Rows
from attlas.reference.convolution import depthwise, gated, separable
from attlas.testing.inputs import randn
from attlas.testing.subject import seeded

T, DIM = 19, 22
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def _module(module: ConvModule, x: Tensor) -> Tensor:
    tail = x.new_zeros(x.shape[0], module.weight.shape[1] - 1 - module.ahead, module.weight.shape[0])
    return module(x, tail, Rows(None, x.shape[1], x.device), literal=False)[0]


def _literal_loop(x: Tensor, weight: Tensor, ahead: int) -> Tensor:
    """One number at a time."""
    out = torch.zeros_like(x)
    rows, length, channels = x.shape
    for b in range(rows):
        for t in range(length):
            for c in range(channels):
                for i in range(weight.shape[1]):
                    s = t - (weight.shape[1] - 1 - ahead) + i
                    out[b, t, c] += weight[c, i] * x[b, s, c] if 0 <= s < length else 0
    return out


def test_gated_module_equals_seamless_m4t_with_gradients() -> None:
    from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import SeamlessM4Tv2ConformerConvolutionModule

    fields = {
        "hidden_size": DIM,
        "conv_depthwise_kernel_size": 5,
        "speech_encoder_hidden_act": "swish",
        "speech_encoder_dropout": 0,
    }
    theirs = seeded(SeamlessM4Tv2ConformerConvolutionModule(SimpleNamespace(**fields)), torch.float64)
    theirs.layer_norm = torch.nn.Identity()  # the norm before the module is the layer's
    ours = ConvModule(DIM, DIM, 5, 0, "gated").double()
    weights = theirs.state_dict()
    ours.load_state_dict({
        "up.weight": weights["pointwise_conv1.weight"][..., 0],
        "weight": weights["depthwise_conv.weight"][:, 0],
        "norm.weight": weights["depthwise_layer_norm.weight"],
        "norm.bias": weights["depthwise_layer_norm.bias"],
        "down.weight": weights["pointwise_conv2.weight"][..., 0],
    })  # fmt: skip
    x = randn(2, T, DIM).requires_grad_()
    got, want = _module(ours, x), theirs(x)
    torch.testing.assert_close(got, want, **EXACT)
    towards = randn(*got.shape, seed=1)
    mine = torch.autograd.grad(got, [x, ours.weight, ours.up.weight], towards)
    other = torch.autograd.grad(want, [x, theirs.depthwise_conv.weight, theirs.pointwise_conv1.weight], towards)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), **EXACT)


@pytest.mark.parametrize(("kernel", "ahead"), [(1, 0), (4, 0), (5, 2), (7, 3), (43, 21)])
@pytest.mark.parametrize("kind", ["separable", "gated"])
def test_modules_are_the_papers_equations(kind: str, kernel: int, ahead: int) -> None:
    module = seeded(ConvModule(DIM, 13, kernel, ahead, kind), torch.float64)
    x = randn(2, T, DIM, seed=2)
    up, down = module.up.weight, module.down.weight
    if kind == "separable":
        want = separable(x, up, module.act_scale, module.act_bias, module.weight, down, ahead)
    else:
        assert module.norm is not None
        want = gated(x, up, module.weight, module.norm.weight, module.norm.bias, down, ahead)
    torch.testing.assert_close(_module(module, x), want, **EXACT)
    inner = randn(2, 7, 3, seed=3)
    weight = module.weight[:3].detach()
    torch.testing.assert_close(depthwise(inner, weight, ahead), _literal_loop(inner, weight, ahead), **EXACT)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("conv", ["separable", "gated"])
def test_block_is_attention_and_module_in_order(conv: Any, causal: bool) -> None:
    """The three orders, from the catalogue's own attention with the same weights and the paper's equations."""
    options: dict[str, Any] = {"kernel": 5, "conv": conv, "causal": causal}
    attention = seeded(build("causal" if causal else "full", DIM, 1), torch.float64)
    x = randn(2, T, DIM, seed=4)
    for order in ("parallel", "conv-first", "attention-first"):
        block = seeded(ConvHybrid(DIM, 1, order=order, **options), torch.float64)
        block.attention.load_state_dict(attention.state_dict())

        def c(y: Tensor, block: ConvHybrid = block) -> Tensor:
            return _module(block.conv, y)

        want = {
            "parallel": lambda c=c: attention(x) + c(x),
            "conv-first": lambda c=c: c(x) + attention(x + c(x)),
            "attention-first": lambda c=c: attention(x) + c(x + attention(x)),
        }[order]()
        torch.testing.assert_close(block(x), want, **EXACT)


@pytest.mark.parametrize("conv", ["separable", "gated"])
@pytest.mark.parametrize("order", ["parallel", "conv-first", "attention-first"])
def test_chunks_through_the_cache_equal_one_call(conv: Any, order: Any) -> None:
    block = seeded(ConvHybrid(DIM, 1, kernel=7, conv=conv, order=order), torch.float64)
    x = randn(1, T, DIM, seed=5)
    cache, outs, at = block.new_cache(1, T), [], 0
    for n in (1, 5, 2, T - 8):
        outs.append(block(x[:, at : at + n], cache=cache))
        at += n
    torch.testing.assert_close(torch.cat(outs, 1), block(x), **EXACT)


def test_bad_options_are_restated() -> None:
    for wrong in ({"kernel": 4, "causal": False}, {"kernel": 0}, {"conv": "plain"}, {"order": "both"}, {"expansion": 0.01}):
        with pytest.raises(OptionError, match=r"ConvHybrid\(dim=22"):
            ConvHybrid(DIM, 1, **wrong)
