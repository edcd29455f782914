"""The linear recurrence: three forms, every setting, long sequences, packed batches, bad input; and the two convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attlas.errors import OptionError, ShapeError, UnknownNameError, UnsupportedError
from attlas.kernels.blocked.scan import chunk_scan
from attlas.kernels.blocked.wkv import wkv
from attlas.nn.rwkv import wkv_recurrent
from attlas.ops.long_conv import long_conv, short_conv
from attlas.ops.scan import scan
from attlas.reference.linear import scan_recurrent
from attlas.shapes import AuxRequest, SeqInfo
from attlas.testing.budget import assert_budget
from attlas.testing.inputs import randn

B, T, H, K, V = 2, 83, 3, 5, 7
STATE = AuxRequest(state=True)
SETTINGS = (
    "plain",
    "per head",
    "per token",
    "per channel",
    "strong",
    "delta",
    "gated delta",
    "channel delta",
    "low rank",
    "bonus",
    "all",
)


def tensors(setting: str, length: int = T, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], dict[str, Any]]:
    """(q, k, v) and the options of a setting; keys have length 1, as the delta rule wants them."""
    q, k, v = randn(B, length, H, K, seed=1), randn(B, length, H, K, seed=2), randn(B, length, H, V, seed=3)
    k = torch.nn.functional.normalize(k, dim=-1)
    rate, wide = randn(B, length, H, seed=4).sigmoid(), randn(B, length, H, K, seed=5).sigmoid()
    head, channel = randn(H, seed=7).sigmoid(), randn(H, K, seed=8).sigmoid()
    options: dict[str, Any] = {
        "plain": {},
        "per head": {"log_decay": -head},
        "per token": {"log_decay": -rate},
        "per channel": {"log_decay": -wide},
        "strong": {"log_decay": -20 * wide},
        "delta": {"delta": rate},
        "gated delta": {"delta": rate, "log_decay": -rate.square()},
        "channel delta": {"delta": rate, "log_decay": -wide},
        "low rank": {"delta": (-k, k * rate[..., None]), "log_decay": -wide},
        "bonus": {"bonus": channel, "log_decay": -wide},
        "all": {"bonus": channel, "delta": (-k, k * rate[..., None]), "log_decay": -wide},
    }[setting]
    options["initial_state"] = randn(B, H, K, V, seed=6)
    cast = {n: tuple(t.to(dtype) for t in x) if isinstance(x, tuple) else x.to(dtype) for n, x in options.items()}
    return [q.to(dtype), k.to(dtype), v.to(dtype)], cast


def run_with_gradients(qkv: list[Tensor], options: dict[str, Any], **how: Any) -> list[Tensor]:
    flat = [*qkv, *(t for x in options.values() for t in (x if isinstance(x, tuple) else (x,)))]
    leaves = [t.detach().clone().requires_grad_() for t in flat]
    rest = iter(leaves[3:])
    again = {n: tuple(next(rest) for _ in x) if isinstance(x, tuple) else next(rest) for n, x in options.items()}
    out, aux = scan(*leaves[:3], **again, **how, return_aux=STATE)
    grads = torch.autograd.grad(out.sin().sum() + aux.state.cos().sum(), leaves)
    return [out, aux.state, *grads]


@pytest.mark.parametrize("setting", SETTINGS)
def test_three_forms_agree_with_every_gradient(setting: str) -> None:
    qkv, options = tensors(setting)
    want = run_with_gradients(qkv, options, form="recurrent")
    for how in ({"form": "parallel"}, {"form": "chunk"}):
        for got, expected in zip(run_with_gradients(qkv, options, **how), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11, msg=lambda m, how=how: f"{setting} {how}: {m}")


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 33, 128])
def test_any_chunk_size_gives_the_same(chunk_size: int) -> None:
    q, k, v = randn(B, T, H, K, seed=1), 0.3 * randn(B, T, H, K, seed=2), randn(B, T, H, V, seed=3)
    a, b, wide = 0.3 * randn(B, T, H, K, seed=4), 0.3 * randn(B, T, H, K, seed=5), randn(B, T, H, K, seed=6).sigmoid()
    options = {"log_decay": -wide, "a": a, "b": b, "bonus": None, "initial_state": randn(B, H, K, V, seed=7), "scale": 0.7}
    for got, want in zip(chunk_scan(q, k, v, **options, chunk_size=chunk_size), scan_recurrent(q, k, v, **options), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


COMPILED = pytest.mark.parametrize("setting", ["plain", "per head", "per token", "per channel", "strong"])


@COMPILED
def test_compiled_core_stays_in_the_error_budget(setting: str) -> None:
    """Output, final state and every gradient, in fp32, for sizes that fill registers and sizes that do not."""
    qkv, options = tensors(setting, 197)
    truth = run_with_gradients(qkv, options, form="recurrent")
    qkv, options = tensors(setting, 197, torch.float32)
    naive = run_with_gradients(qkv, options, form="parallel")
    got = run_with_gradients(qkv, options, impl="cpu")
    for i, (a, b, c) in enumerate(zip(got, naive, truth, strict=True)):
        assert_budget(a, b, c, f"{setting}, result {i}")


def test_an_explicit_implementation_never_falls_back() -> None:
    (q, k, v), _ = tensors("plain", dtype=torch.float32)
    with pytest.raises(UnsupportedError, match=r"impl='cpu' cannot run this: it has no delta rule"):
        scan(q, k, v, delta=torch.ones(B, T, H), impl="cpu")
    with pytest.raises(UnsupportedError, match="float64"):
        scan(q.double(), k.double(), v.double(), impl="cpu")
    with pytest.raises(UnsupportedError, match="chunk form only"):
        scan(q, k, v, form="parallel", impl="blocked")
    with pytest.raises(UnknownNameError, match="did you mean 'blocked'"):
        scan(q, k, v, impl="block")


@pytest.mark.parametrize("setting", ["per token", "channel delta", "all"])
def test_states_carry_over_any_split(setting: str) -> None:
    qkv, options = tensors(setting)
    state = options.pop("initial_state")
    constant = {n: options.pop(n) for n in ("bonus",) if n in options}
    want, whole = scan(*qkv, **options, **constant, initial_state=state, return_aux=STATE)
    outs, at = [], 0
    for n in (1, 16, 0, 31, 2, T - 50):
        part = [t[:, at : at + n] for t in qkv]
        here = {
            name: tuple(t[:, at : at + n] for t in x) if isinstance(x, tuple) else x[:, at : at + n]
            for name, x in options.items()
        }
        out, aux = scan(*part, **here, **constant, initial_state=state, return_aux=STATE)
        outs.append(out)
        state, at = aux.state, at + n
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, whole.state, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("setting", SETTINGS)
def test_fp32_stays_near_fp64(setting: str) -> None:
    qkv, options = tensors(setting)
    want = scan(*qkv, **options, form="recurrent")
    qkv, options = tensors(setting, dtype=torch.float32)
    for form in ("recurrent", "chunk", "parallel"):
        got = scan(*qkv, **options, form=form)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


def test_strong_decay_over_a_long_sequence_neither_overflows_nor_loses_gradients() -> None:
    length = 5003
    q, k, v = (randn(1, length, 2, n, seed=i).float().requires_grad_() for i, n in enumerate((5, 5, 7)))
    for scale in (0.0, 1e-4, 1.0, 30.0):
        log_decay = (-scale * randn(1, length, 2, 5, seed=9).abs()).float().requires_grad_()
        out, aux = scan(q, k, v, log_decay=log_decay, return_aux=STATE)
        grads = torch.autograd.grad(out.square().mean() + aux.state.square().mean(), (q, k, v, log_decay))
        assert all(t.isfinite().all() for t in (out, aux.state, *grads)), f"decay up to {scale}"
        truth = scan(q.double(), k.double(), v.double(), log_decay=log_decay.double())
        error = (out.double() - truth).abs().max() / truth.abs().max()
        assert error < 5e-6, f"decay up to {scale}: relative error {error:.2g}"


@pytest.mark.heavy
def test_state_drift_of_fp32_after_100_000_steps() -> None:
    """Token by token in fp32 against the chunk form in fp64."""
    length = 100_003
    q, k, v = (randn(1, length, 1, n, seed=i) for i, n in enumerate((5, 5, 7)))
    k = torch.nn.functional.normalize(k, dim=-1)
    log_decay, beta = -1e-3 * randn(1, length, 1, seed=4).abs(), randn(1, length, 1, seed=5).sigmoid()
    with torch.inference_mode():
        _, exact = scan(q, k, v, log_decay=log_decay, delta=beta, return_aux=STATE)
        state = torch.zeros(1, 1, 5, 7)
        for t in range(length):
            here = slice(t, t + 1)
            args = [x[:, here].float() for x in (q, k, v)]
            _, aux = scan(
                *args, log_decay=log_decay[:, here].float(), delta=beta[:, here].float(), initial_state=state, return_aux=STATE
            )
            state = aux.state
    drift = (state.double() - exact.state).abs().max() / exact.state.abs().max()
    assert drift < 1e-5, drift


def test_packed_sequences_start_from_their_own_states() -> None:
    lengths = (7, 0, 31, 1)
    seq, total = SeqInfo(lengths), sum(lengths)
    q, k, v = randn(total, H, K, seed=1), randn(total, H, K, seed=2), randn(total, H, V, seed=3)
    options = {"log_decay": -randn(total, H, K, seed=4).sigmoid(), "delta": randn(total, H, seed=5).sigmoid()}
    states = randn(len(lengths), H, K, V, seed=6)
    out, aux = scan(q, k, v, **options, initial_state=states, seq=seq, return_aux=STATE)
    at = 0
    for i, n in enumerate(lengths):
        here = slice(at, at + n)
        alone = {name: x[None, here] for name, x in options.items()}
        want, end = scan(q[None, here], k[None, here], v[None, here], **alone, initial_state=states[i : i + 1], return_aux=STATE)
        torch.testing.assert_close(out[here], want[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(aux.state[i], end.state[0], rtol=1e-12, atol=1e-12)
        at += n


def test_limits_are_the_simpler_members() -> None:
    (q, k, v), _ = tensors("plain")
    plain = scan(q, k, v)
    sums = torch.einsum("bthk,bshk->bhts", q, k).tril() * K**-0.5
    torch.testing.assert_close(plain, torch.einsum("bhts,bshv->bthv", sums, v))
    torch.testing.assert_close(scan(q, k, v, log_decay=torch.zeros(H, dtype=torch.float64)), plain)
    torch.testing.assert_close(scan(q, k, v, delta=torch.zeros(B, T, H, dtype=torch.float64)), torch.zeros_like(plain))
    forgets = scan(q, k, v, log_decay=torch.full((H,), -1e4, dtype=torch.float64))
    own = K**-0.5 * (q * k).sum(-1, keepdim=True) * v
    torch.testing.assert_close(forgets, own)


def test_bad_input_restates_the_call() -> None:
    (q, k, v), _ = tensors("plain", 5)
    decay = torch.zeros(B, 5, H, dtype=torch.float64)
    for wrong in (
        {"log_decay": decay + 0.1},
        {"form": "chunks"},
    ):
        with pytest.raises(OptionError, match="scan"):
            scan(q, k, v, **wrong)
    for wrong in (
        {"log_decay": decay[:, :3]},
        {"delta": decay[..., :1]},
        {"bonus": q[0, 0, :, :2]},
        {"delta": (k, v)},
        {"initial_state": randn(B, H, V, K)},
    ):
        with pytest.raises(ShapeError, match=r"scan: .*\[2, "):
            scan(q, k, v, **wrong)
    with pytest.raises(ShapeError, match="share dtype"):
        scan(q.float(), k, v)
    with pytest.raises(ShapeError, match="seq has 4 tokens"):
        scan(q[0], k[0], v[0], seq=SeqInfo((4,)))


@pytest.mark.parametrize("length", [0, 1, 2])
def test_short_sequences(length: int) -> None:
    qkv, options = tensors("all", length)
    for form in ("recurrent", "chunk", "parallel", "auto"):
        out, aux = scan(*qkv, **options, form=form, return_aux=STATE)
        assert out.shape == (B, length, H, V)
        if not length:
            assert torch.equal(aux.state, options["initial_state"])


def test_wkv_equals_its_definition_also_for_large_keys_and_ragged_rows() -> None:
    k, v = 60 * randn(3, 41, 5, seed=1), randn(3, 41, 5, seed=2)
    decay, bonus = -randn(5, seed=3).exp(), randn(5, seed=4)
    start = randn(3, 5, seed=5), torch.full((3, 5), float("-inf"), dtype=torch.float64)
    valid = torch.arange(41) < torch.tensor([[41], [7], [18]])
    for mask in (None, valid):
        got, want = wkv(k, v, decay, bonus, *start, mask), wkv_recurrent(k, v, decay, bonus, *start, mask)
        keep = slice(None) if mask is None else mask
        torch.testing.assert_close(got[0][keep], want[0][keep])
        torch.testing.assert_close(got[1:], want[1:])
    literal = torch.empty_like(v)
    for t in range(41):
        age = torch.arange(t - 1, -2, -1, dtype=torch.float64)[:, None]
        weight = (age * decay + k[:, : t + 1]).clone()
        weight[:, t] = bonus + k[:, t]
        literal[:, t] = (weight.softmax(1) * v[:, : t + 1]).sum(1)
    torch.testing.assert_close(wkv(k, v, decay, bonus, *start, None)[0], literal)


@pytest.mark.parametrize("length", [1, 2, 13, 31])
@pytest.mark.parametrize("taps", [1, 5, 31])
def test_long_conv_is_the_toeplitz_product(length: int, taps: int) -> None:
    u, kernel = randn(2, length, 3, seed=1).requires_grad_(), randn(3, taps, seed=2).requires_grad_()
    matrix = torch.zeros(3, length, length, dtype=torch.float64)
    for t in range(length):
        for s in range(max(0, t - taps + 1), t + 1):
            matrix[:, t, s] = kernel[:, t - s]
    want = torch.einsum("cts,bsc->btc", matrix, u)
    got = long_conv(u, kernel)
    torch.testing.assert_close(got, want)
    weight = randn(2, length, 3, seed=3)
    torch.testing.assert_close(torch.autograd.grad((got * weight).sum(), u), torch.autograd.grad((want * weight).sum(), u))
    assert torch.autograd.gradcheck(long_conv, (u, kernel))


def test_long_conv_both_ways() -> None:
    u, kernel = randn(2, 11, 3, seed=1), randn(3, 2, 13, seed=2)
    want = torch.zeros_like(u)
    for t in range(11):
        for s in range(11):
            tap = kernel[:, 0, t - s] if s <= t else kernel[:, 1, s - t - 1]
            want[:, t] += tap * u[:, s]
    torch.testing.assert_close(long_conv(u, kernel, bidirectional=True), want)
    with pytest.raises(ShapeError, match="long_conv"):
        long_conv(u, kernel)


def test_short_conv_continues_from_its_tail() -> None:
    x, weight, bias = randn(2, 13, 3, seed=1), randn(3, 4, seed=2), randn(3, seed=3)
    want = torch.nn.functional.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=3)[..., :13].transpose(1, 2)
    torch.testing.assert_close(short_conv(x, weight, bias), want)
    torch.testing.assert_close(short_conv(x[:, 5:], weight, bias, tail=x[:, 2:5]), want[:, 5:])
    with pytest.raises(ShapeError, match="tail"):
        short_conv(x, weight, tail=x[:, :2])
