"""ops.attention inside torch.compile: one graph, the same numbers, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attlas.errors import OptionError, UnsupportedError
from attlas.masks import Causal, Window
from attlas.masks.base import Mask
from attlas.ops import attention
from attlas.ops.traced import attention_op
from attlas.scores import Alibi, RelativeBias, ScoreMod, Softcap
from attlas.shapes import AuxRequest, SeqInfo

CAUSAL = Causal()
BAND = Causal() & Window.last(11)
CAP = Softcap(5.0)


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(7)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype).requires_grad_()

    return {
        "q": make(2, 37, 6, 13),
        "k": make(2, 37, 3, 13),
        "v": make(2, 37, 3, 5),
        "sink": make(6),
        "slopes": make(6),
        "table": make(8, 6),
    }


def with_lse(t: dict[str, Tensor]) -> Tensor:
    out, aux = attention(t["q"], t["k"], t["v"], mask=BAND, sink=t["sink"], return_aux=AuxRequest(lse=True))
    return out.sum(-1) + aux.lse


CASES: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "no mask": lambda t: attention(t["q"], t["k"], t["v"]),
    "mask": lambda t: attention(t["q"], t["k"], t["v"], mask=BAND, scale=0.3),
    "sink and lse": with_lse,
    "cap, then alibi": lambda t: attention(t["q"], t["k"], t["v"], mask=BAND, score_mod=CAP >> Alibi(t["slopes"])),
    "table": lambda t: attention(t["q"], t["k"], t["v"], score_mod=RelativeBias(t["table"], bidirectional=True, max_distance=17)),
    "blocked": lambda t: attention(t["q"], t["k"], t["v"], mask=BAND, impl="blocked"),
    "sdpa": lambda t: attention(t["q"], t["k"], t["v"], mask=CAUSAL, impl="sdpa"),
    "reference": lambda t: attention(t["q"], t["k"], t["v"], mask=BAND, impl="reference"),
    "packed": lambda t: attention(t["q"][0], t["k"][0], t["v"][0], mask=BAND, seq=SeqInfo((23, 14))),
    "packed, starts": lambda t: attention(
        t["q"][0, :8], t["k"][0], t["v"][0], mask=BAND, seq=SeqInfo((5, 3), lengths_k=(20, 17), starts=(12, 9))
    ),
}


def results(f: Callable[[dict[str, Tensor]], Tensor], t: dict[str, Tensor]) -> list[Tensor | None]:
    out = f(t)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), list(t.values()), allow_unused=True)]


@pytest.mark.parametrize("name", CASES)
def test_one_graph_with_the_same_numbers(name: str) -> None:
    torch._dynamo.reset()
    t = inputs()
    compiled = torch.compile(CASES[name], fullgraph=True, backend="aot_eager")
    for got, want in zip(results(compiled, t), results(CASES[name], t), strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(t), CASES[name](t), rtol=0, atol=1e-6)


def test_a_new_mask_is_seen() -> None:
    """A graph is guarded by the mask it was made with."""
    torch._dynamo.reset()
    t = inputs()
    box = {"mask": Causal()}

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask=box["mask"])

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        first = compiled(t["q"], t["k"], t["v"])
        box["mask"] = Window(2, 2)
        second = compiled(t["q"], t["k"], t["v"])
        torch.testing.assert_close(second, f(t["q"], t["k"], t["v"]))
    assert not torch.equal(first, second)


def test_handles() -> None:
    one, same = Window(3, 0), Window(3, 0)
    assert one == same and one.handle != same.handle
    assert Mask.of_handle(one.handle) is one
    gone = same.handle
    del same
    with pytest.raises(OptionError, match=f"mask {gone} is gone"):
        Mask.of_handle(gone)


def test_unknown_score_mods_are_refused() -> None:
    class Mine(ScoreMod):
        def __call__(self, scores: Tensor, q_pos: Tensor, k_pos: Tensor, heads: Tensor | None = None) -> Tensor:
            return scores * 2

    torch._dynamo.reset()
    t, mine = inputs(), Mine()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, score_mod=mine), backend="aot_eager", fullgraph=True)
    with pytest.raises((UnsupportedError, torch._dynamo.exc.Unsupported)):
        compiled(t["q"], t["k"], t["v"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operator_passes_opcheck(dtype: torch.dtype) -> None:
    t = inputs(dtype)
    q, k, v = t["q"], t["k"], t["v"]
    torch.library.opcheck(attention_op, (q, k, v, [], None, BAND.handle, "", None, [], "auto", False, True))
    torch.library.opcheck(attention_op, (q, k, v, [t["slopes"]], t["sink"], BAND.handle, "alibi", 0.3, [], "auto", True, True))
    with torch.no_grad():
        still = [x.detach() for x in (q, k, v)]
        torch.library.opcheck(attention_op, (*still, [], None, "", "softcap 3.0", None, [], "auto", False, False))
