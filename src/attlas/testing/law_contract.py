"""Laws about the contract itself: options count, errors restate the call, costs are told truly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from attlas.errors import AttlasError
from attlas.masks.expr import Nothing
from attlas.scores import Softcap
from attlas.shapes import SeqInfo
from attlas.testing.inputs import BATCH, LONG, SHORT, randn
from attlas.testing.literal import literal_attend
from attlas.testing.subject import Subject

_UNKNOWN = "no-such-implementation"
# Another value for options whose default says nothing about their type.
_OTHER: dict[str, Any] = {
    "scale": 0.31,
    "num_kv_heads": 1,
    "memory_dim": 17,
    "score_mod": Softcap(0.7),
    "head_dim": 4,
    "num_heads": 1,
}


def _changed(s: Subject, name: str, value: Any) -> Any:
    if name in s.variants:
        return s.variants[name]
    if name == "attend":
        assert s.reference is not None
        return literal_attend(s.reference, lambda mask: Nothing())
    if isinstance(value, bool):
        return not value
    if name == "head_dim" and value == 4:
        return 6
    if name in _OTHER:
        return _OTHER[name]
    if isinstance(value, int):
        return value - 2 if value > 2 else value + 1
    if isinstance(value, float):
        return value * 1.5
    raise AssertionError(f"{s.name}: give the card a variant for option {name!r} (its value here is {value!r})")


def liveness(s: Subject) -> None:
    """Every option of the mixer's signature changes the weights' shapes or the output, or raises."""
    base = s.make()
    shapes = {n: p.shape for n, p in base.named_parameters()}
    x, memory = randn(BATCH, LONG, s.dim), s.memory(base, BATCH)
    y = base(x, **memory)
    for name, parameter in s.parameters.items():
        value = _changed(s, name, s.options.get(name, parameter.default))
        try:
            other = s.make(**{name: value})
            if {n: p.shape for n, p in other.named_parameters() if n in shapes} != shapes:
                continue
            assert not torch.allclose(other(x, **memory), y, rtol=1e-6), f"{s.name}: option {name}={value!r} changes nothing"
        except AttlasError:
            continue


def flops(s: Subject) -> None:
    """`flops(n)` counts no more than the brute-force computation does, and exactly as much when every pair is allowed."""
    for label, mixer in s.faces().items():
        twin = s.twin(mixer)
        with FlopCounterMode(display=False) as counter:
            twin(randn(1, LONG, s.dim), **s.memory(mixer, 1, LONG))
        useful, measured = mixer.flops(LONG), counter.get_total_flops()
        assert 0 < useful <= measured, f"{s.name} ({label}): flops({LONG}) says {useful}, brute force takes {measured}"
        if s.reference is not None and mixer.describe_mask() is None:
            assert useful == measured, f"{s.name} ({label}): flops({LONG}) says {useful}, measured {measured}"


def _bad_calls(s: Subject, mixer: Any) -> dict[str, Callable[[], Any]]:
    x = randn(BATCH, SHORT, s.dim)
    memory = s.memory(mixer, BATCH)
    calls = {
        "x too wide": lambda: mixer(randn(BATCH, SHORT, s.dim + 1), **memory),
        "x with four dimensions": lambda: mixer(x[None], **memory),
        "x of another dtype": lambda: mixer(x.float(), **memory),
        "packed x without seq": lambda: mixer(x[0], **memory),
        "packed x with another number of tokens": lambda: mixer(
            x[0], seq=SeqInfo((SHORT - 1,), (7,) if memory else None), **memory
        ),
        "padded x with another number of rows": lambda: mixer(x, seq=SeqInfo((3,)), **memory),
        "padded x with a row that is too long": lambda: mixer(x, seq=SeqInfo((3, SHORT + 1)), **memory),
        "an implementation that does not exist": lambda: s.make().use(_UNKNOWN)(x, **memory),
        "positions that are fractions": lambda: mixer(x, positions=torch.rand(SHORT), **memory),
        "positions of another length": lambda: mixer(x, positions=torch.arange(SHORT + 1), **memory),
    }
    if memory:
        wide = memory["memory"].shape[-1] + 1
        calls |= {
            "no memory": lambda: mixer(x),
            "memory too wide": lambda: mixer(x, memory=randn(BATCH, 5, wide)),
            "memory of another batch": lambda: mixer(x, memory=memory["memory"][:1]),
            "packed memory without lengths": lambda: mixer(x[0], seq=SeqInfo((SHORT,)), memory=memory["memory"][0]),
        }
    else:
        calls |= {
            "memory": lambda: mixer(x, memory=x),
            "lengths of a memory that is not there": lambda: mixer(x[0], seq=SeqInfo((SHORT,), lengths_k=(5,))),
        }
    return calls


def _bad_cache_calls(s: Subject, mixer: Any) -> dict[str, Callable[[], Any]]:
    x = randn(BATCH, SHORT, s.dim)
    memory = s.memory(mixer, BATCH)
    if "decode" not in s.supports:
        return {"a cache for a mixer that cannot decode": lambda: mixer.new_cache()}
    calls = {
        "more rows than the cache has": lambda: mixer(x, cache=mixer.new_cache(rows=1), **memory),
        "one cache row for two sequences": lambda: mixer(
            x, seq=SeqInfo((3, 3), ids=(0, 0)), cache=mixer.new_cache(rows=2), **memory
        ),
    }
    if mixer.uses_positions:
        calls["positions that disagree with the cache"] = lambda: mixer(
            x, positions=torch.arange(4, SHORT + 4), cache=mixer.new_cache(rows=BATCH), **memory
        )
    if "head_dim" in s.options:
        other = s.make(head_dim=s.options["head_dim"] + 2)
        calls["the cache of another layer"] = lambda: mixer(x, cache=other.new_cache(rows=BATCH), **memory)
    return calls


def errors(s: Subject) -> None:
    """A call that cannot be right raises an AttlasError that names the mixer and its options."""
    mixer = s.make()
    for what, call in (_bad_calls(s, mixer) | _bad_cache_calls(s, mixer)).items():
        message = _message(s, what, call)
        restated = _UNKNOWN in message if "implementation" in what else "dim=" in message and s.name in message
        assert restated, f"{s.name}, {what}: does not restate the call: {message}"
    built: dict[str, dict[str, Any]] = {}
    if "num_heads" in s.parameters:
        built["no heads"] = {"num_heads": 0}
    if "head_dim" in s.parameters:
        built["dim that the heads do not divide"] = {"head_dim": None, "dim": 23, "num_heads": 3}
    if "num_kv_heads" in s.parameters:
        built["key/value heads that do not divide the heads"] = {"num_kv_heads": s.options["num_heads"] + 1}
    for what, changes in built.items():
        message = _message(s, what, lambda c=changes: s.make(**c))  # type: ignore[misc]
        assert "dim=" in message, f"{s.name}, {what}: the error does not restate the call: {message}"


def _message(s: Subject, what: str, call: Callable[[], Any]) -> str:
    try:
        call()
    except AttlasError as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{s.name}, {what}: {type(error).__name__} instead of an AttlasError: {error}") from error
    raise AssertionError(f"{s.name}: {what} is accepted")
