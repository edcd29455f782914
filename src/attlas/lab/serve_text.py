"""Rows of the serving bench as sentences. A figure with a bar is followed by it, and by `!` where it is missed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attlas.lab import units

Told = Mapping[str, Any]


def agreed(kind: str, told: Told) -> str:
    """How far rounding moves the engine, beside transformers."""
    return (
        f"the most likely token is that of float32 at {told['agree']} of {told['places']} places (transformers in {kind}: "
        f"{told['theirs_agree']}), log probabilities are off by at most {told['error']:.2g} (transformers: "
        f"{told['their_error']:.2g})"
    )


def ratios(row: Told) -> str:
    """'2.31x transformers (>= 2), 1.2x llama.cpp'."""
    said = []
    for name, value in row.items():
        if name.startswith("over "):
            said.append(f"{value:.2f}x {name.removeprefix('over ')}{wanted(row, name.removeprefix('over '), value)}")
    return ", ".join(said)


def wanted(row: Told, what: str, value: float) -> str:
    """The bar of a value, where it has one: the one whose name the value's name begins with, at that value."""
    for bar in row["bars"]:
        if what.startswith(bar["what"]) and bar["value"] == value:
            limit = f">= {bar['least']:g}" if bar["least"] is not None else f"< {bar['most']:g}"
            return f" ({limit}){'' if bar['met'] else '!'}"
    return ""


def sign(row: Told, what: str) -> str:
    return "" if all(bar["met"] for bar in row["bars"] if bar["what"] == what) else "!"


def sentence(row: Told) -> str:
    """One row as text."""
    return SENTENCES[row["name"]](row)


def decode_one(row: Told) -> str:
    mine = row["seconds_per_token"]["attlas"]
    return f"one request: {units.seconds(mine)} a token, {1 / mine:.0f} tokens/s, {ratios(row)}"


def batch(row: Told) -> str:
    return f"{row['tokens']} tokens of mixed requests at once: {row['tokens_per_second']:.0f} tokens/s, {ratios(row)}"


def shared_prefix(row: Told) -> str:
    scaled = [f"{name} from {n}, scaled" for name, n in row["measured"].items() if n < row["requests"]]
    differ = f"; {row['answers_differ']} answers differ from those without" if row["answers_differ"] else ""
    first = row["first_token"]
    return (
        f"{row['requests']} requests behind one prefix: {units.seconds(row['seconds']['attlas'])}, {ratios(row)}"
        f"{' (' + '; '.join(scaled) + ')' if scaled else ''}; {row['computed']:,} of {row['prompt_tokens']:,} prompt tokens "
        f"computed (least {row['least_to_compute']:,}){sign(row, 'prefixes computed beyond one')}; first token "
        f"{units.seconds(first['hit'])} behind it, {units.seconds(first['miss'])} without, {row['miss_over_hit']:.1f}x "
        f"(>= 10){sign(row, 'miss over hit')}{differ}"
    )


def goodput(row: Told) -> str:
    slo, highest = row["slo"], row["highest_kept"]
    lines = [
        f"conversations, first token within {slo['first_token']:g} s and {1e3 * slo['per_token']:g} ms a token; served at "
        + ("none of these rates" if highest is None else f"up to {highest:.2f} requests/s")
        + f"; {100 * row['waste']:.1f} % of used pages waste (< 4){sign(row, 'waste')}",
        f"  {'requests/s':>10} {'asked':>6} {'kept':>6} {'goodput':>8} {'first p50':>10} {'first p99':>10} {'token p99':>10} "
        f"{'tokens/s':>9} {'waste':>6}",
    ]
    return "\n".join([*lines, *map(_rate, row["rates"])])


def _rate(row: Told) -> str:
    waits = [units.seconds(row[name]) for name in ("first_token_p50", "first_token_p99", "per_token_p99")]
    return (
        f"  {row['rate']:>10.2f} {row['requests']:>6} {100 * row['kept']:>4.0f} % {row['goodput']:>8.2f} {waits[0]:>10} "
        f"{waits[1]:>10} {waits[2]:>10} {row['tokens_per_second']:>9.0f} {100 * row['waste']:>4.1f} %"
    )


def no_hits(row: Told) -> str:
    on, off, apart = row["calls"]["on"], row["calls"]["off"], row["difference"]
    return (
        f"prefix caching without a hit: {100 * row['cost']:.2f} % (< 1){sign(row, 'cost')} by the clock ({100 * on:.2f} % of the "
        f"time is in the cache's calls, {100 * off:.2f} % without); end to end {100 * apart['median']:+.2f} %, 95 % interval "
        f"{100 * apart['low']:+.2f} ... {100 * apart['high']:+.2f} % of {row['rounds']} rounds"
        f"{sign(row, 'difference, low end')} (two engines without: {100 * row['control']:+.2f} % apart)"
    )


def cancelled(row: Told) -> str:
    lost = f"{row['leaked']} pages and {row['leaked_rows']} rows leaked{sign(row, 'pages and rows leaked')}"
    return f"after {row['cancelled']} cancelled requests: {lost}"


SENTENCES = {
    "decode one": decode_one,
    "mixed batch": batch,
    "shared prefix": shared_prefix,
    "goodput": goodput,
    "no hits": no_hits,
    "cancelled": cancelled,
}
