"""Rotary positions against transformers, against complex numbers, and far from zero."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DeepseekV3Config, GPTJConfig, GPTNeoXConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.llama import modeling_llama as llama

from attlas.errors import OptionError, ShapeError, UnsupportedError
from attlas.positions import NTK, DynamicNTK, Each, Linear, Llama3, Rope, Yarn

HEADS, DIM, T = 3, 22, 37

# name -> (scaling, what transformers calls it)
SCALINGS = {
    "linear": (Linear(3.0), {"rope_type": "linear", "factor": 3.0}),
    "yarn": (Yarn(5.0, 512), {"rope_type": "yarn", "factor": 5.0, "original_max_position_embeddings": 512}),
    "yarn-betas": (
        Yarn(7.0, 256, beta_fast=17.0, beta_slow=2.0, truncate=False),
        {
            "rope_type": "yarn",
            "factor": 7.0,
            "original_max_position_embeddings": 256,
            "beta_fast": 17.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
    ),
    "yarn-mscale": (
        Yarn(40.0, 1024, mscale=0.707, mscale_all_dim=1.3),
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 1024,
            "mscale": 0.707,
            "mscale_all_dim": 1.3,
        },
    ),
    "yarn-attention": (
        Yarn(5.0, 128, attention_factor=1.5),
        {"rope_type": "yarn", "factor": 5.0, "original_max_position_embeddings": 128, "attention_factor": 1.5},
    ),
    "llama3": (
        Llama3(8.0, 1.0, 4.0, 64),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
}


def config(base: float = 10000.0, dim: int = DIM, **rope) -> LlamaConfig:
    rope = {"rope_theta": base, "rope_type": "default"} | rope
    return LlamaConfig(
        hidden_size=HEADS * dim, head_dim=dim, num_attention_heads=HEADS, max_position_embeddings=2048, rope_parameters=rope
    )


def qk(dtype: torch.dtype = torch.float32, dim: int = DIM, tokens: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, tokens, HEADS, dim, generator=g, dtype=dtype) for _ in range(2))


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bqhd,bkhd->bhqk", q, k)


# ---- frequencies and rotations of transformers


@pytest.mark.parametrize("base", [10000.0, 500000.0, 1e6])
@pytest.mark.parametrize("name", SCALINGS)
def test_inverse_frequencies_are_those_of_transformers(name, base):
    scaling, theirs = SCALINGS[name]
    for dim in (DIM, 64, 128):
        want, factor = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config(base, dim, **theirs), "cpu")
        rope = Rope(dim, base, scaling=scaling)
        assert torch.equal(rope.inverse_frequencies(), want)
        assert rope.attention_factor == pytest.approx(factor, rel=1e-12)


def test_unscaled_frequencies_are_those_of_transformers():
    for base, dim in ((10000.0, DIM), (500000.0, 128), (1e6, 64)):
        want = llama.LlamaRotaryEmbedding(config(base, dim)).inv_freq
        assert torch.equal(Rope(dim, base).inverse_frequencies(), want)


@pytest.mark.parametrize("length", [1, 2048, 2049, 9999])
def test_dynamic_ntk_is_that_of_transformers_at_every_length(length):
    theirs = config(rope_type="dynamic", factor=3.0)
    want, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, "cpu", seq_len=length)
    rope = Rope(DIM, scaling=DynamicNTK(3.0, 2048, length))
    assert torch.equal(rope.inverse_frequencies(), want)
    assert torch.equal(Rope(DIM, scaling=DynamicNTK(3.0, 2048, 5)).at_length(length).inverse_frequencies(), want)
    assert torch.equal(want, Rope(DIM).inverse_frequencies()) == (length <= 2048)


def test_static_ntk_divides_the_lowest_frequency_and_keeps_the_highest():
    plain, scaled = Rope(64).inverse_frequencies(), Rope(64, scaling=NTK(8.0)).inverse_frequencies()
    assert scaled[0] == plain[0] == 1
    assert scaled[-1] == pytest.approx(float(plain[-1]) / 8, rel=1e-5)
    assert torch.equal(scaled, Rope(64, 10000.0 * 8.0 ** (64 / 62)).inverse_frequencies())


@pytest.mark.parametrize("name", [None, *SCALINGS])
def test_rotated_q_and_k_are_those_of_llama(name):
    scaling, theirs = SCALINGS[name] if name else (None, {})
    embed = llama.LlamaRotaryEmbedding(config(**theirs))
    q, k = qk()
    positions = torch.arange(T) + 11
    cos, sin = embed(q, positions[None])
    want = llama.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    rope = Rope(DIM, scaling=scaling)
    for got, w in zip((rope(q, positions), rope(k, positions)), want, strict=True):
        assert (got - w.transpose(1, 2)).abs().max() < 3e-5  # their angles are rounded to fp32


def test_rotated_q_is_that_of_gpt_neox_with_partial_rotation():
    c = GPTNeoXConfig(
        hidden_size=HEADS * 32,
        num_attention_heads=HEADS,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.25},
    )
    q, k = qk(dim=32)
    positions = torch.arange(T)
    cos, sin = neox.GPTNeoXRotaryEmbedding(c)(q, positions[None])
    want, _ = neox.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    got = Rope(32, rotary_dim=8)(q, positions)
    assert (got - want.transpose(1, 2)).abs().max() < 1e-5
    assert torch.equal(got[..., 8:], q[..., 8:])


def test_rotated_q_is_that_of_gptj():
    c = GPTJConfig(n_embd=HEADS * DIM, n_head=HEADS, rotary_dim=10)
    q, _ = qk()
    table = gptj.create_sinusoidal_positions(64, c.rotary_dim)
    positions = torch.arange(T) + 7
    sin, cos = table[positions].chunk(2, dim=-1)
    turned = gptj.apply_rotary_pos_emb(q[..., :10], sin[None], cos[None])
    got = Rope(DIM, rotary_dim=10, interleaved=True)(q, positions)
    assert (got - torch.cat((turned, q[..., 10:]), -1)).abs().max() < 1e-5


@pytest.mark.parametrize("name", [None, "yarn-mscale"])
def test_scores_are_those_of_deepseek(name):
    scaling, theirs = SCALINGS[name] if name else (None, {"rope_type": "default"})
    c = DeepseekV3Config(qk_rope_head_dim=DIM, rope_parameters={"rope_theta": 10000.0} | theirs)
    q, k = qk()
    positions = torch.arange(T) + 3
    cos, sin = deepseek.DeepseekV3RotaryEmbedding(c)(q, positions[None])
    theirs_q, theirs_k = deepseek.apply_rotary_pos_emb_interleave(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    rope = Rope(DIM, interleaved=True, scaling=scaling)
    got = scores(rope(q, positions), rope(k, positions))
    assert (got - theirs_q @ theirs_k.transpose(-1, -2)).abs().max() < 2e-4  # their layout is another one, the products are equal


def test_interleaved_rotation_is_that_of_deepseek_v2():
    q, k = qk()
    rope = Rope(DIM, interleaved=True)
    angles = torch.arange(T)[:, None] * rope.inverse_frequencies()
    want, _ = apply_rotary_emb(q.transpose(1, 2), k.transpose(1, 2), torch.polar(torch.ones_like(angles), angles)[None])
    assert (rope(q, torch.arange(T)) - want.transpose(1, 2)).abs().max() < 1e-5


# ---- by definition -----------------------------------------------------------------------------------------------------------


def by_definition(rope: Rope, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Complex multiplication, fp64."""
    count = rope.turned // 2
    angles = positions.double()[..., None, None] * rope.inverse_frequencies().double()
    turn = torch.polar(torch.full_like(angles, rope.attention_factor), angles)
    x = x.double()
    if rope.interleaved:
        z = torch.complex(x[..., 0 : 2 * count : 2], x[..., 1 : 2 * count : 2]) * turn
        head = torch.stack((z.real, z.imag), -1).flatten(-2)
    else:
        z = torch.complex(x[..., :count], x[..., count : 2 * count]) * turn
        head = torch.cat((z.real, z.imag), -1)
    return torch.cat((head, x[..., 2 * count :]), -1)


ROPES = [
    Rope(DIM),
    Rope(DIM, 5e5, interleaved=True),
    Rope(DIM, rotary_dim=10),
    Rope(DIM, rotary_dim=14, interleaved=True, scaling=Yarn(4.0, 128)),
]


@pytest.mark.parametrize("rope", ROPES, ids=repr)
@pytest.mark.parametrize("tokens", [T, 1009])  # the second one is large enough for the other code path
def test_rotation_by_definition(rope, tokens):
    q, _ = qk(torch.float64, tokens=tokens)
    assert (q.numel() > 1 << 16) == (tokens == 1009)
    shared, own = torch.randint(0, 10_000_000, (tokens,)), torch.randint(-99, 10_000_000, (2, tokens))
    for positions in (shared, own, own.int()):
        assert (rope(q, positions) - by_definition(rope, q, positions)).abs().max() < 1e-13
    assert (rope(q[0], shared) - by_definition(rope, q[0], shared)).abs().max() < 1e-13
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(rope(strided, shared), rope(q, shared))


@pytest.mark.parametrize("rope", ROPES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once_even_at_ten_million(rope, dtype):
    for tokens in (T, 1009):
        q, _ = qk(dtype, tokens=tokens)
        positions = torch.arange(tokens) + 10_000_000
        got = rope(q, positions)
        assert got.dtype == dtype
        error = (got.double() - by_definition(rope, q, positions)).abs().max()
        assert error < 8 * torch.finfo(dtype).eps


def test_scores_depend_on_the_distance_alone_far_from_zero():
    rope = Rope(DIM)
    q, k = qk()
    near, far = torch.arange(T), torch.arange(T) + 30_000_011
    assert (scores(rope(q, near), rope(k, near)) - scores(rope(q, far), rope(k, far))).abs().max() < 2e-5


@pytest.mark.parametrize("rope", ROPES, ids=repr)
def test_the_bits_of_a_token_do_not_depend_on_its_company(rope):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        q, _ = qk(dtype, tokens=1009)
        positions = torch.arange(1009) + 5
        whole = rope(q, positions)
        for t in (0, 500, 1008):
            assert torch.equal(whole[:, t : t + 1], rope(q[:, t : t + 1], positions[t : t + 1]))
        with torch.no_grad():
            assert torch.equal(whole, rope(q.clone(), positions))
        assert torch.equal(whole, rope(q.clone().requires_grad_(), positions))


def test_shared_cos_and_sin_and_the_inverse():
    rope = Rope(DIM, scaling=Yarn(4.0, 128))
    q, _ = qk(torch.float64)
    positions = torch.arange(T) + 100
    cos, sin = rope.cos_sin(positions, torch.float64)
    assert cos.shape == sin.shape == (T, 1, DIM // 2)
    assert torch.equal(rope.rotate(q, cos, sin), rope(q, positions))
    assert (rope(rope(q, positions), -positions) - q * rope.attention_factor**2).abs().max() < 1e-13


@pytest.mark.parametrize("tokens", [5, 1009])
def test_gradients(tokens):
    rope = Rope(6, rotary_dim=4, interleaved=True, scaling=Linear(2.0))
    positions = torch.arange(5)
    if tokens == 5:
        x = torch.randn(5, 2, 6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda t: rope(t, positions), x)
        assert torch.autograd.gradgradcheck(lambda t: rope(t, positions), x)
        return
    x = torch.randn(tokens, 67, 6, dtype=torch.float64, requires_grad=True)
    positions, weight = torch.arange(tokens), torch.randn(tokens, 67, 6, dtype=torch.float64, requires_grad=True)
    assert x.numel() > 1 << 16
    (grad,) = torch.autograd.grad((rope(x, positions) * weight).sum(), x, create_graph=True)
    plain = rope(weight, -positions)  # the transpose of a rotation; attention_factor is 1 here
    assert (grad - plain).abs().max() < 1e-13
    again = torch.autograd.grad(grad.square().sum(), weight)[0]
    assert (again - 2 * weight).abs().max() < 1e-12


def test_transforms_and_compilation():
    rope = Rope(8, rotary_dim=6)
    positions = torch.arange(3001)
    x = torch.randn(2, 3001, 4, 8)
    assert torch.equal(torch.vmap(lambda t: rope(t, positions))(x), rope(x, positions))
    _, tangent = torch.func.jvp(lambda t: rope(t, positions), (x,), (torch.ones_like(x),))
    assert torch.equal(tangent, rope(torch.ones_like(x), positions))
    compiled = torch.compile(lambda t, p: rope(t, p), fullgraph=True, backend="aot_eager")
    got = compiled(x.clone().requires_grad_(), positions)
    assert (got - rope(x, positions)).abs().max() < 1e-6
    got.sum().backward()


def test_a_rope_is_a_value_that_nothing_can_round():
    a, b = Rope(64, 5e5, scaling=Llama3()), Rope(64, 5e5, scaling=Llama3())
    a(torch.randn(3, 1, 64), torch.arange(3))
    assert a == b and hash(a) == hash(b) and a != Rope(64, 5e5)
    assert eval(repr(a)) == a

    class Holder(torch.nn.Module):
        rope = a

    before = a.inverse_frequencies()
    Holder().to(torch.bfloat16)
    with torch.device("meta"):
        meta = Rope(64, 5e5, scaling=Llama3())
    assert torch.equal(meta.inverse_frequencies(), before) and torch.equal(a.inverse_frequencies(), before)
    with torch.inference_mode():
        fresh = Rope(10)
        fresh(torch.randn(2, 1, 10), torch.arange(2))
    x = torch.randn(2, 1, 10, requires_grad=True)
    fresh(x, torch.arange(2)).sum().backward()
    assert x.grad.abs().max() > 0


def test_dynamic_ntk_keys_of_an_older_length_do_not_fit():
    """What the docstring warns of: after a change of length, equal distances no longer give equal scores."""
    rope = Rope(DIM, scaling=DynamicNTK(4.0, 64, 64))
    q, k = (t[:1, :1].expand(1, T, HEADS, DIM) for t in qk(torch.float64))
    positions = torch.arange(T)
    one = scores(rope(q, positions), rope(k, positions))[0, 0]
    mixed = scores(rope.at_length(256)(q, positions), rope(k, positions))[0, 0]
    diagonals = [[s.diagonal(-d).std() for d in range(1, 9)] for s in (one, mixed)]
    assert max(diagonals[0]) < 1e-12 < 1e-3 < min(diagonals[1])


def test_errors_restate_the_call():
    for make in (
        lambda: Rope(7),
        lambda: Rope(8, rotary_dim=3),
        lambda: Rope(8, rotary_dim=10),
        lambda: Rope(8, rotary_dim=0),
        lambda: Rope(8, 1.0),
        lambda: Rope(8, scaling=4.0),
        lambda: Rope(2, scaling=NTK(2.0)),
        lambda: Linear(0.0),
        lambda: NTK(-1.0),
        lambda: DynamicNTK(2.0, 2048, 0),
        lambda: Yarn(2.0, 128, beta_fast=1.0, beta_slow=2.0),
        lambda: Llama3(8.0, 4.0, 4.0),
        lambda: Each((1.0, 0.0)),
        lambda: Rope(8, scaling=Each((1.0, 2.0))),
    ):
        with pytest.raises(OptionError, match=r"\("):
            make()
    with pytest.raises(UnsupportedError, match="do not depend on the sequence length"):
        Rope(8, scaling=Linear(2.0)).at_length(9)
    rope, x = Rope(8), torch.randn(2, 5, 3, 8)
    for bad_x, positions, words in (
        (x[..., :6], torch.arange(5), r"x must be floating point \[\.\.\., T, H, 8\]"),
        (x[0, 0], torch.arange(3), "x must be"),
        (x.long(), torch.arange(5), "x must be"),
        (x, torch.arange(5.0), "integers"),
        (x, torch.ones(5, dtype=torch.bool), "integers"),
        (x, torch.arange(4), r"\[T\] or \[B, T\]"),
        (x, torch.zeros(3, 5, dtype=torch.int64), r"\[T\] or \[B, T\]"),
        (x, torch.tensor(1), r"\[T\] or \[B, T\]"),
        (x, torch.arange(5, device="meta"), "one device"),
    ):
        with pytest.raises(ShapeError, match=words):
            rope(bad_x, positions)


def test_nothing_is_turned_into_nothing():
    for shape in ((0, 3, 8), (2, 0, 3, 8), (2, 5, 0, 8)):
        x = torch.randn(shape)
        assert Rope(8)(x, torch.arange(shape[-3])).shape == x.shape


def test_angles_turn_by_the_stated_radians():
    x = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64).view(1, 1, 4)
    assert Rope(4, 100.0)(x, torch.tensor([2])).flatten().tolist() == pytest.approx([math.cos(2), 0, math.sin(2), 0])
    assert Rope(4, 100.0, interleaved=True)(x, torch.tensor([2])).flatten().tolist() == pytest.approx(
        [math.cos(2), math.sin(2), 0, 0]
    )
