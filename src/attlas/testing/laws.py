"""The laws: what every mixer of the catalogue keeps. Each is a function of a `Subject` that raises AssertionError when it is
broken.

for law in laws_for(subject.claims):
    LAWS[law].check(subject)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from attlas.testing import law_cache, law_contract, law_order, law_values
from attlas.testing.subject import Subject


@dataclass(frozen=True)
class Law:
    """check(subject) raises AssertionError when the law is broken. needs: the claim that makes it apply, "" = always."""

    check: Callable[[Subject], None]
    needs: str = ""


LAWS: Mapping[str, Law] = MappingProxyType(
    {
        "reference": Law(law_values.reference),
        "gradcheck": Law(law_values.gradcheck, "backward"),
        "dtypes": Law(law_values.dtypes),
        "autocast": Law(law_values.autocast, "backward"),
        "degenerate": Law(law_values.degenerate, "degenerate"),
        "noncontiguous": Law(law_values.noncontiguous),
        "compile": Law(law_values.compiles, "compile"),
        "causal": Law(law_order.causal, "causal"),
        "bidirectional": Law(law_order.bidirectional, "bidirectional"),
        "cross": Law(law_order.cross, "cross"),
        "batch-rows": Law(law_order.batch_rows),
        "packed": Law(law_order.packed, "packed"),
        "padding": Law(law_order.padding, "packed"),
        "positions": Law(law_order.positions),
        "empty": Law(law_order.empty),
        "decode": Law(law_cache.decode, "decode"),
        "decode-dtypes": Law(law_cache.decode_dtypes, "decode"),
        "unwritten-slots": Law(law_cache.unwritten_slots, "stores-tokens"),
        "ragged-paged": Law(law_cache.ragged_paged, "decode"),
        "rollback": Law(law_cache.rollback, "extends-itself"),
        "cache-bytes": Law(law_cache.cache_bytes, "decode"),
        "liveness": Law(law_contract.liveness),
        "flops": Law(law_contract.flops),
        "errors": Law(law_contract.errors),
    }
)


def laws_for(claims: Iterable[str]) -> tuple[str, ...]:
    """The names of the laws that apply to a mixer with these claims (`Subject.claims`)."""
    claims = set(claims)
    return tuple(name for name, law in LAWS.items() if not law.needs or law.needs in claims)
