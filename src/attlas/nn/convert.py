"""Trained attention layers rewritten with another head layout: fewer key/value heads, or a latent.

A conversion returns a new mixer with weights of its own, and says how far it is from the one it was made from. What cannot be
converted is refused with the reason; nothing is left out silently.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from attlas.errors import OptionError, UnsupportedError
from attlas.masks.leaves import Causal
from attlas.nn.attention import Attention
from attlas.nn.linear_latent import LinearLatent
from attlas.nn.mixer import Mixer

PLAIN = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "sink", "score_params"}


@dataclass(frozen=True)
class Conversion:
    """A converted mixer.

    mixer         the new one
    options       what `attlas.build(mixer.name, dim, num_heads, ...)` needs beside the options that did not change
    errors        relative Frobenius error of each projection (weight and bias as one matrix), |W - W'| / |W|: "k_proj", "v_proj",
                  and "kv" for both together
    unrotated     to_latent only: the part of k_proj, in the same measure, whose channels have lost their rotary positions. It is
                  not in `errors`: the keys are still there, but not at their angle
    output_error  |y - y'| / |y| of the outputs for the given activations, None when none were given
    """

    mixer: Mixer
    options: Mapping[str, Any]
    errors: Mapping[str, float]
    unrotated: float = 0.0
    output_error: float | None = field(default=None)

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {error:.3g}" for name, error in self.errors.items())
        shown += f", unrotated {self.unrotated:.3g}" if self.unrotated else ""
        return f"{self.mixer.name}: {shown}" + ("" if self.output_error is None else f", output {self.output_error:.3g}")


# ---- fewer key/value heads -------------------------------------------------------------------------------------------------


def to_grouped(
    mixer: Attention, num_kv_heads: int, *, activations: Tensor | None = None, memory: Tensor | None = None
) -> Conversion:
    """Every group of neighbouring key heads becomes one head, their mean; so do the value heads. Queries and output stay.

    num_kv_heads  how many are left; 1 is multi-query. It must divide the present number
    activations   inputs x [B, T, dim] (for cross-attention also memory) on which the outputs are compared

    Exact where the heads of a group are equal. Rotary positions do not disturb the mean: every head is turned alike, after the
    projection. A norm on the keys (qk_norm) does: the norm of a mean is not the mean of norms, which `errors` do not show and
    `output_error` does. Meant to be followed by training (the paper: 5 % of the original steps).
    Raises OptionError, and UnsupportedError for layers with key heads beyond k_proj and v_proj.
    Source: Ainslie et al. 2023, arXiv 2305.13245.
    """
    call = f"to_grouped({mixer}, num_kv_heads={num_kv_heads})"
    if not isinstance(mixer, Attention):
        raise UnsupportedError(f"{call}: only softmax attention has key and value heads that can be shared")
    further = {name.partition(".")[0] for name, _ in mixer.named_parameters()} - PLAIN
    if further:
        raise UnsupportedError(f"{call}: beside one k_proj and one v_proj this layer has {sorted(further)}, which no rule covers")
    if num_kv_heads < 1 or mixer.num_kv_heads % num_kv_heads:
        raise OptionError(f"{call}: num_kv_heads must divide the present {mixer.num_kv_heads} key/value heads")
    converted, shape = copy.deepcopy(mixer), (num_kv_heads, mixer.head_dim)
    pairs = {}
    for name in ("k_proj", "v_proj"):
        old: nn.Linear = getattr(mixer, name)
        means = _affine(old).unflatten(0, (num_kv_heads, -1, mixer.head_dim)).mean(1)
        setattr(converted, name, _linear(means.flatten(0, 1), old, old.bias is not None))
        spread = means[:, None].expand(-1, mixer.num_kv_heads // num_kv_heads, -1, -1).flatten(0, 2)
        pairs[name] = _affine(old), spread
    converted.num_kv_heads = num_kv_heads
    converted._specs = (replace(mixer._specs[0], tensors=(("k", shape), ("v", shape))),)
    if converted.name == "multi-head":
        converted.named("grouped-query")
    output = None if activations is None else output_error(mixer, converted, activations, memory)
    return Conversion(converted, {"num_kv_heads": num_kv_heads}, _errors(pairs), output_error=output)


# ---- a latent --------------------------------------------------------------------------------------------------------------


def to_latent(
    mixer: Attention, rank: int | None = None, *, rope_keys: int | None = None, activations: Tensor | None = None
) -> Conversion:
    """Keys and values become linear maps of one latent of `rank` numbers per token: the truncated singular value decomposition of
    the joint projection [k; v], the best of its rank.

    rank         None = full: nothing is lost. The errors fall with the rank, those of k and v each by itself
    rope_keys    how many rotated keys all heads share; None = one for each key head
    activations  inputs x [B, T, dim] on which the outputs are compared

    Rotary positions are the difficulty: a key that is turned after it was made from the latent cannot be absorbed, so what turns
    must be cached as it is. All key heads turn by the same angles, hence for each frequency the heads may be mixed by any
    orthogonal matrix, in keys and queries alike, and no score changes. It is chosen so that the first mixtures hold as much of
    the key projection as possible (its principal components); `rope_keys` of them stay, rotated, outside of the latent. With as
    many as there are key heads that is everything: exact. With fewer, the rest of each key goes into the latent and loses its
    rotation (`unrotated`), however high the rank. Multi-query layers, layers without rotary positions, and the channels that a
    partial rotation leaves alone convert exactly.

    The result is a `linear-latent`, whose scale is that of the original. Its cache is smaller than the original's where
    rank + rope_keys * (rotated channels) < 2 num_kv_heads head_dim.
    Cost: one decomposition of a 2 num_kv_heads head_dim by dim matrix, in fp64. Raises OptionError, and UnsupportedError for what
    a latent layer lacks: other masks, score modifications, sinks, norms on q and k, a memory.
    Source: Meng et al. 2025, arXiv 2502.07864; DeepSeek-AI 2024, arXiv 2405.04434, for the form.
    """
    call = f"to_latent({mixer}, rank={rank}, rope_keys={rope_keys})"
    _check_plain(call, mixer)
    turning = 0 if mixer.rope is None else mixer.num_kv_heads
    rope_keys = turning if rope_keys is None else rope_keys
    if not min(1, turning) <= rope_keys <= turning:
        raise OptionError(f"{call}: rope_keys must be between {min(1, turning)} and {turning}, the key heads that turn")
    split = _split_rotation(mixer, rope_keys)
    joint = torch.cat([split.nope.flatten(0, 1), _affine(mixer.v_proj)])
    left, sizes, right = torch.linalg.svd(joint, full_matrices=False)
    rank = len(sizes) if rank is None else rank
    if not 1 <= rank <= len(sizes):
        raise OptionError(f"{call}: the rank must be between 1 and {len(sizes)}, the full rank of this layer's keys and values")
    down, up = right[:rank], left[:, :rank] * sizes[:rank]
    bias = mixer.q_proj.bias is not None and ("qkv" if mixer.o_proj.bias is None else True)
    options: dict[str, Any] = {
        "kv_lora_rank": rank, "qk_nope_head_dim": split.nope.shape[1], "v_head_dim": mixer.head_dim, "rope_keys": rope_keys,
        "causal": mixer.causal, "scale": mixer.head_dim**-0.5 if mixer.scale is None else mixer.scale, "bias": bias,
    }  # fmt: skip
    if mixer.rope is not None:
        options |= {
            "qk_rope_head_dim": mixer.rope.turned,
            "rope": replace(mixer.rope, head_dim=mixer.rope.turned, rotary_dim=None),
        }
    converted = LinearLatent(mixer.dim, mixer.num_heads, **options, attend=mixer.attend).to(mixer.k_proj.weight)
    group = mixer.num_heads // mixer.num_kv_heads
    ups = up.split([len(joint) - mixer.v_proj.out_features, mixer.v_proj.out_features])
    each = torch.cat([u.unflatten(0, (mixer.num_kv_heads, -1)) for u in ups], 1)  # [Hkv, nope + v, rank]
    with torch.no_grad():
        _fill(converted.q_proj, torch.cat([split.q_nope, split.q_rope], 1).flatten(0, 1))
        _fill(converted.kv_a_proj, torch.cat([down, split.shared.flatten(0, 1)]))
        _fill(converted.kv_b_proj, each.repeat_interleave(group, 0).flatten(0, 1))
        converted.o_proj.load_state_dict(mixer.o_proj.state_dict())
    converted.train(mixer.training).use(mixer.impl)
    pairs = {"k_proj": (joint[: len(ups[0])], ups[0] @ down, split.size), "v_proj": (joint[len(ups[0]) :], ups[1] @ down)}
    output = None if activations is None else output_error(mixer, converted, activations)
    return Conversion(converted, options, _errors(pairs), split.unrotated, output)


@dataclass(frozen=True)
class Split:
    """Affine maps [..., rows, dim (+ 1 with a bias)] in fp64, by what becomes of them.

    q_nope [H, nope, :], q_rope [H, rope_keys * turned, :]   queries
    nope [Hkv, nope, :]        the keys that go into the latent
    shared [rope_keys, turned, :]   the keys that all heads share, rotated
    size                       |k_proj|
    unrotated                  the part of it that has lost its rotation
    """

    q_nope: Tensor
    q_rope: Tensor
    nope: Tensor
    shared: Tensor
    size: float
    unrotated: float


def _split_rotation(mixer: Attention, rope_keys: int) -> Split:
    heads, kv = mixer.num_heads, mixer.num_kv_heads
    q, k = _affine(mixer.q_proj).unflatten(0, (heads, -1)), _affine(mixer.k_proj).unflatten(0, (kv, -1))
    size = k.norm().item()
    if mixer.rope is None:
        return Split(q, q[:, :0], k, k[:0], size, 0.0)
    turned, rope = mixer.rope.turned, mixer.rope
    # channel -> its pair: [turned]; the two channels of a pair get the same mixture of heads
    pair = torch.arange(turned) // 2 if rope.interleaved else torch.arange(turned) % (turned // 2)
    by_pair = torch.stack([k[:, :turned][:, pair == p] for p in range(turned // 2)])  # [pairs, Hkv, 2, in]
    flat = by_pair.flatten(2)
    _, vectors = torch.linalg.eigh(flat @ flat.mT)  # energies ascending
    mixing = vectors.flip(-1).mT[pair.to(k.device)][:, :rope_keys]  # [turned, rope_keys, Hkv]
    shared = torch.einsum("cmg,gci->mci", mixing, k[:, :turned])
    own = mixing.repeat_interleave(heads // kv, -1)  # [turned, rope_keys, H]
    q_rope = torch.einsum("cmh,hci->hmci", own, q[:, :turned]).flatten(1, 2)
    if rope_keys == kv:
        return Split(q[:, turned:], q_rope, k[:, turned:], shared, size, 0.0)
    rest = k.clone()
    rest[:, :turned] -= torch.einsum("cmg,mci->gci", mixing, shared)
    unrotated = (rest[:, :turned].norm() / size).item()
    rest[:, :turned] *= rope.attention_factor**2  # what a rotation by no angle does
    return Split(q, q_rope, rest, shared, size, unrotated)


def _check_plain(call: str, mixer: Attention) -> None:
    reasons = {
        f"a {type(mixer).__name__} is more than one softmax over one set of keys": type(mixer) is not Attention,
        "its mask must be Causal() or None": type(mixer) is Attention and mixer.mask not in (None, Causal()),
        "it changes scores": getattr(mixer, "_score_mod", None) is not None,
        "it has a sink": getattr(mixer, "sink", None) is not None,
        "it norms q and k": getattr(mixer, "q_norm", None) is not None,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise UnsupportedError(f"{call}: a latent layer cannot compute this one: {'; '.join(found)}")


# ---- matrices and errors ---------------------------------------------------------------------------------------------------


def _affine(linear: nn.Linear) -> Tensor:
    """[out, in], or [out, in + 1] with the bias as last column, in fp64."""
    weight = linear.weight.detach().double()
    return weight if linear.bias is None else torch.cat([weight, linear.bias.detach().double()[:, None]], 1)


def _fill(linear: nn.Linear, affine: Tensor) -> None:
    linear.weight.copy_(affine[:, : linear.in_features])
    if linear.bias is not None:
        linear.bias.copy_(affine[:, linear.in_features])


def _linear(affine: Tensor, like: nn.Linear, bias: bool) -> nn.Linear:
    made = nn.Linear(like.in_features, affine.shape[0], bias, like.weight.device, like.weight.dtype)
    with torch.no_grad():
        _fill(made, affine)
    return made


def _errors(pairs: Mapping[str, tuple[Any, ...]]) -> dict[str, float]:
    """name -> (W, W'[, size of the projection that W is a part of]); relative errors of each and of all together."""
    lost = {name: (pair[0] - pair[1]).norm().item() for name, pair in pairs.items()}
    sizes = {name: pair[2] if len(pair) > 2 else pair[0].norm().item() for name, pair in pairs.items()}
    found = {name: lost[name] / sizes[name] if sizes[name] else 0.0 for name in pairs}
    whole = sum(s**2 for s in sizes.values()) ** 0.5
    return {**found, "kv": sum(e**2 for e in lost.values()) ** 0.5 / whole if whole else 0.0}


def output_error(before: Mixer, after: Mixer, activations: Tensor, memory: Tensor | None = None) -> float:
    """|y - y'| / |y| (Frobenius, over all tokens) of two mixers' outputs for x = activations [B, T, dim]."""
    given = {} if memory is None else {"memory": memory}
    with torch.no_grad():
        y, other = (mixer(activations, **given).double() for mixer in (before, after))
    return ((y - other).norm() / y.norm()).item()
