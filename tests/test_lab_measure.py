"""The lab's clock, fits and memory counters, and the numbers that people read."""

from __future__ import annotations

import math
import time

import pytest
import torch

from attlas.errors import OptionError, UnsupportedError
from attlas.lab import measure, units


def test_median_and_quartiles():
    timing = measure.Timing.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (timing.low, timing.median, timing.high) == (2.0, 3.0, 4.0)
    assert timing.spread == pytest.approx(2 / 3)
    assert measure.Timing.of([7.0]).to_dict() == {"median": 7.0, "low": 7.0, "high": 7.0, "repeats": 1}
    with pytest.raises(OptionError, match="no samples"):
        measure.Timing.of([])


def test_functions_take_turns_and_the_order_rotates():
    calls: list[str] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = measure.time_interleaved(functions, 3, warmup=1, min_sample=0)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert {len(t.samples) for t in timings.values()} == {3}


def test_fast_functions_are_called_several_times_per_sample():
    count = [0]

    def tick() -> None:
        count[0] += 1

    timing = measure.time_interleaved({"tick": tick}, 2, warmup=0, min_sample=1e-3)["tick"]
    assert count[0] > 100
    assert timing.median < 1e-4


def test_times_are_those_of_one_call():
    timing = measure.time_interleaved({"nap": lambda: time.sleep(0.003)}, 3, warmup=0)["nap"]
    assert 0.003 <= timing.median < 0.05


def test_rounds_stop_when_the_time_is_up_but_one_is_complete():
    timings = measure.time_interleaved({"nap": lambda: time.sleep(0.01)}, 50, warmup=0, min_sample=0, max_seconds=0.001)
    assert len(timings["nap"].samples) == 1
    with pytest.raises(OptionError, match="repeats"):
        measure.time_interleaved({}, 0)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.7, 2.0])
def test_the_fit_finds_the_exponent_of_a_power_law(exponent):
    lengths = [256, 512, 1024, 2048, 4096]
    law = measure.fit_power_law(lengths, [3e-7 * n**exponent for n in lengths])
    assert law.exponent == pytest.approx(exponent, abs=1e-9)
    assert law.factor == pytest.approx(3e-7)
    assert law(8192) == pytest.approx(3e-7 * 8192**exponent)
    assert law.error == pytest.approx(0, abs=1e-6)


def test_the_fit_looks_at_the_longest_lengths_and_knows_its_error():
    lengths = [16, 32, 64, 256, 512, 1024, 2048]
    values = [1.0, 1.0, 1.0, *(1e-5 * n**2 for n in lengths[3:])]  # a constant overhead, then quadratic
    assert measure.fit_power_law(lengths, values).exponent == pytest.approx(2.0)
    assert measure.fit_power_law(lengths, values, last=None).exponent < 1.7
    # With noise the standard error covers the truth; reference by hand: slope of log2 values 0, 1.2, 1.8, 3.0 is 0.96.
    noisy = measure.fit_power_law([1, 2, 4, 8], [2**0.0, 2**1.2, 2**1.8, 2**3.0])
    assert noisy.exponent == pytest.approx(0.96)
    assert noisy.error == pytest.approx(math.sqrt((0.06**2 + 0.18**2 + 0.18**2 + 0.06**2) / 2 / 5))


def test_too_few_points_give_no_fit():
    assert measure.fit_power_law([64], [1.0]) is None
    assert measure.fit_power_law([64, 64], [1.0, 2.0]) is None
    assert measure.fit_power_law([64, 128], [1.0, float("nan")]) is None
    with pytest.raises(ValueError, match="zip"):
        measure.fit_power_law([1, 2], [1.0])


def test_peak_of_tensors_counts_what_lives_at_once():
    n = 251 * 1009

    def both() -> None:
        a = torch.ones(n)
        b = a + 1
        del a
        c = b + 1
        del b, c

    assert measure.peak_allocated(both) == pytest.approx(2 * 4 * n, rel=0.01)


def test_peak_counts_what_backward_needs():
    x = torch.randn(499, 499, requires_grad=True)

    def step() -> None:
        (x * 2).exp().sum().backward()
        x.grad = None

    assert measure.peak_allocated(step) >= 2 * 4 * 499**2


def test_limits_and_stamp_of_this_machine():
    assert 1e8 < measure.gemm_rate(size=192, repeats=3) < 1e15
    assert 1e7 < measure.copy_bandwidth(nbytes=1 << 22, repeats=3) < 1e14
    stamp = measure.machine_stamp()
    assert stamp["threads"] == torch.get_num_threads() and stamp["cores"] >= 1 and stamp["cpu"]
    assert measure.useful_threads() == 1  # the tests run on one


def hold(megabytes: int) -> int:
    return int(torch.ones(megabytes << 18).sum())


def give(megabytes: int) -> int:
    return megabytes


def fail(megabytes: int) -> None:
    raise RuntimeError(f"no {megabytes} today")


def test_resident_memory_of_a_call_in_its_own_process():
    peak = measure.peak_rss(hold, (64,), setup=give)
    assert 60 << 20 < peak.growth < 90 << 20
    assert peak.to_dict() == {"peak": peak.peak, "baseline": peak.baseline, "growth": peak.growth}


def test_an_error_in_the_other_process_is_told():
    with pytest.raises(UnsupportedError, match="no 3 today"):
        measure.peak_rss(fail, (3,))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 µs"),
        (12.34e-6, "12.3 µs"),
        (0.9996e-3, "1.00 ms"),
        (0.0123, "12.3 ms"),
        (1.5, "1.50 s"),
        (432.1, "432 s"),
        (None, "–"),
    ],
)
def test_seconds_as_people_read_them(value, text):
    assert units.seconds(value) == text


def test_other_numbers_as_people_read_them():
    assert [units.nbytes(n) for n in (5, 1023, 1024, 1536, 1 << 20, 3 << 30)] == [
        "5 B",
        "1,023 B",
        "1 KiB",
        "1.5 KiB",
        "1 MiB",
        "3 GiB",
    ]
    assert units.short_seconds(0.002) == "2 ms" and units.short_seconds(0.0015) == "1.5 ms"
    assert units.times(0.251) == "0.25×" and units.percent(0.995) == "99.5 %" and units.fixed(None) == "–"
    assert units.words(3) == "three" and units.words(1234) == "1,234"
    assert units.listed(["a"]) == "a" and units.listed(["a", "b", "c"]) == "a, b and c" and units.listed([]) == ""
    assert units.digits(1234.5) == "1,234" and units.digits(0.001234) == "0.00123"
