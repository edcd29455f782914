"""Memory of block-wise attention grows with the tokens, not with their square; its speed is reported only when it is right."""

import pytest

from attlas.lab import bench_attention
from attlas.lab.bench_attention import peak_memory
from attlas.ops import select
from attlas.ops.select import Impl

LIMIT = 3.0  # times the bytes of q, k, v and out


def test_peak_memory_of_a_training_step():
    found = peak_memory(4099, 8, 64)
    assert found["base"] == 4 * 4099 * 8 * 64 * 4
    assert 0.9 < found["ratio"] < LIMIT, found  # out and three gradients alone are 1


@pytest.mark.heavy
@pytest.mark.parametrize("impl", ["blocked", "auto"])
def test_peak_memory_of_a_long_training_step(impl):
    found = peak_memory(32768, 8, 64, impl=impl)
    assert 0.9 < found["ratio"] < LIMIT, found


def test_bench_reports_every_implementation_that_can_run():
    result = bench_attention.run(tokens=149, heads=2, dim=8, only=["causal", "random"], impls=("blocked", "sdpa"), repeats=2)
    assert [set(row["rate"]) for row in result["rows"]] == [{"blocked", "sdpa"}] * 2 + [{"blocked"}] * 2
    text = bench_attention.table(result)
    assert "causal, backward" in text and "blocked" in text and "decode" in text
    assert all(x > 0 for row in result["rows"] for x in row["of_gemm"].values())


def test_bench_says_nothing_about_a_wrong_result(monkeypatch, capsys):
    def spoil(impl: Impl) -> Impl:
        def run(call):
            out, lse = impl.run(call)
            return out + 1e-3, lse

        return Impl(impl.name, impl.supports, run, impl.steps_aside)

    monkeypatch.setitem(select.IMPLS, "attention", tuple(spoil(i) for i in select.IMPLS["attention"]))
    with pytest.raises(AssertionError, match="blocked: out"):
        bench_attention.run(tokens=149, heads=2, dim=8, only=["causal"], impls=("blocked",), repeats=1)
    assert capsys.readouterr().out == ""


def test_bench_refuses_a_case_that_does_not_exist():
    with pytest.raises(ValueError, match="no case is named like"):
        bench_attention.run(only=["nothing of this name"])
