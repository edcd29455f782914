"""What long sequences cost: how time grows for every mechanism that claims less than a square, sparse encoders beside those of
transformers, and decoding from a latent.

python -m attlas.lab.bench_scaling [name ...]

Everything is checked before anything is timed: outputs and gradients against brute force, against transformers with the same
weights, decoding against one prefill. What is wrong is all that is then said. Times are medians of rounds in turns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attlas.errors import OptionError
from attlas.kernels.cpu.library import status
from attlas.lab import scaling_decode, scaling_growth, scaling_peers, units
from attlas.lab.measure import machine_stamp
from attlas.lab.progress import Progress, make_progress
from attlas.lab.scaling_growth import BAR, STEEPER

DECODE = "multi-head-latent"
PARTS = ("growth", "peers", "decode")
# Rough seconds of one unit of work on two cores: only the bar of the progress reads them.
SECONDS = {"gate": 2.0, "growth": 4.0, "peers": 40.0, "memory": 40.0, "decode": 5.0}


def run(
    *,
    only: Sequence[str] = (),
    parts: Sequence[str] = PARTS,
    lengths: Sequence[int] = (1024, 2048, 4096, 8192, 16384, 32768),
    peer_lengths: Sequence[int] = (8192, 16384),
    decode_tokens: int = 8192,
    repeats: int = 3,
    max_seconds: float = 12.0,
    memory: bool = True,
    picture: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Check, then measure.

    only           texts; a mechanism takes part when its name contains one of them (none = all)
    parts          growth (time over length, small width), peers (beside transformers, width 768), decode (from a latent)
    lengths        of the growth; the exponent is fitted to the four longest
    peer_lengths   of the comparison with transformers, multiples of 512
    decode_tokens  cached tokens before a decoded one
    repeats        timed rounds; of the growth 2 repeats + 1
    max_seconds    no new round of one mechanism at one length begins after this
    memory         also measure peak memory beside transformers, at the first of peer_lengths
    picture        an HTML file for the plots of the growth
    quiet          no progress on stderr
    """
    units_of_work = _plan(only, parts, lengths, peer_lengths, decode_tokens, memory)
    result: dict[str, Any] = {"growth": [], "peers": [], "memory": [], "decode": []}
    with make_progress(quiet) as progress:
        totals = {stage: SECONDS[stage] * len(tasks) for stage, tasks in units_of_work.items() if tasks}
        progress.stages(totals, {})
        _gate(units_of_work["gate"], progress)
        for stage, tasks in units_of_work.items():
            for what, task in tasks if stage != "gate" else ():
                progress.begin(stage, what, SECONDS[stage])
                row = task(repeats, max_seconds)
                result[stage].append(row)
                progress.end(stage, what, what)
    if picture is not None and result["growth"]:
        from attlas.lab.figure_growth import page

        picture.write_text(page(result["growth"]), encoding="utf-8")
    square = scaling_growth.quadratic(only) if "growth" in parts else []
    return {"machine": machine_stamp(), "core": status(), "threads": torch.get_num_threads(), "quadratic": square, **result}


Task = tuple[str, Callable[..., Any]]


def _plan(
    only: Sequence[str],
    parts: Sequence[str],
    lengths: Sequence[int],
    peer_lengths: Sequence[int],
    decode_tokens: int,
    memory: bool,
) -> dict[str, list[Task]]:
    """stage -> (what, function): `gate` first, whose functions say what is wrong."""
    if wrong := set(parts) - set(PARTS):
        raise OptionError(f"bench scaling: no part {sorted(wrong)}; parts: {', '.join(PARTS)}")
    if min(lengths, default=0) < 1 or min(peer_lengths, default=0) < 1 or any(n % scaling_peers.WINDOW for n in peer_lengths):
        raise OptionError(f"bench scaling: lengths={lengths}, peer_lengths={peer_lengths}: at least 1, peers in steps of 512")
    entries = scaling_growth.grown(only) if "growth" in parts else ()
    peers = scaling_peers.known(only) if "peers" in parts else ()
    decodes = "decode" in parts and (not only or any(text in DECODE for text in only))
    if not (entries or peers or decodes):
        names = [c.name for c in scaling_growth.grown()]
        raise OptionError(f"bench scaling: nothing is named like {list(only)}; there are {', '.join([*names, DECODE])}")
    longest = max(lengths)
    gate: list[Task] = [(c.name, partial(scaling_growth.check, c, longest)) for c in entries]
    gate += [(f"{n} beside transformers", partial(scaling_peers.check, n)) for n in peers]
    gate += [(f"{DECODE} decoding", scaling_decode.check)] * decodes
    beside: list[Task] = [(f"{n} at {t}", partial(scaling_peers.measure, n, t)) for n in peers for t in peer_lengths]
    held = [n for n in peers if memory and scaling_peers.PEERS[n].memory is not None]
    return {
        "gate": gate,
        "growth": [(c.name, partial(scaling_growth.measure, c, tuple(sorted(lengths)))) for c in entries],
        "decode": [(DECODE, partial(scaling_decode.measure, decode_tokens))] * decodes,
        "memory": [(n, partial(_memory, n, peer_lengths[0])) for n in held],
        "peers": beside,
    }


def _memory(name: str, tokens: int, repeats: int, max_seconds: float) -> dict[str, Any]:
    return scaling_peers.memory(name, tokens)


def _gate(tasks: Sequence[Task], progress: Progress) -> None:
    problems = []
    for what, task in tasks:
        progress.begin("gate", what, SECONDS["gate"])
        wrong = task()
        problems += [] if wrong is None else [wrong]
        progress.end("gate", what, what if wrong is None else f"{what}: RED")
    assert not problems, "nothing is timed: " + "; ".join(problems)


# ---- as text ------------------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The result as text; `!` marks a missed bar."""
    lines: list[str] = []
    if result["growth"]:
        lines += _growth(result["growth"])
    if result["quadratic"]:
        lines.append(f"not measured, as their cards claim n^2: {', '.join(result['quadratic'])}")
    if result["peers"]:
        lines += _peers(result["peers"])
    for row in result["memory"]:
        amounts = f"{units.nbytes(row['mine'])} against {units.nbytes(row['theirs'])}"
        sign = "" if row["ratio"] <= row["bar"] else "!"
        lines.append(
            f"{row['name']} at {row['tokens']}, peak memory of a training step: {amounts}, {row['ratio']:.2f} of transformers' "
            f"(<= {row['bar']:.2f}){sign}"
        )
    for row in result["decode"]:
        times = {k: units.seconds(v["median"]) for k, v in row["seconds"].items()}
        sign = "" if row["ratio"] >= row["bar"] else "!"
        lines += [
            f"{DECODE}, one token behind {row['tokens']}: {times['absorbed']} from the latent, {times['expanded']} with keys and "
            f"values made of it: {row['ratio']:.1f}x (>= {row['bar']:.0f}){sign}",
            f"its cache: {row['bytes_per_token']} bytes per token, {row['cache_bytes']} in all; keys and values would take "
            f"{row['expanded_bytes_per_token']} per token",
        ]
    lines.append(f"core {result['core']}, {result['threads']} threads")
    return "\n".join(lines)


def _growth(rows: Sequence[dict[str, Any]]) -> list[str]:
    grows, takes = f"{'forward ~ n^':>16} {'training ~ n^':>16}", f"{'forward in':>10} {'training in':>11} {'first time':>11}"
    lines = [f"{'mechanism':22} {grows} {'longest':>9} {takes}"]
    for row in rows:
        exponents = [_exponent(row, what) for what in ("forward", "training")]
        times = [units.seconds(row[what]["seconds"][-1]["median"]) for what in ("forward", "training")]
        once = "+ " + units.seconds(row["first_seconds"])
        longest = f"{row['lengths'][-1]:,}"
        lines.append(
            f"{row['name']:22} {exponents[0]:>16} {exponents[1]:>16} {longest:>9} {times[0]:>10} {times[1]:>11} {once:>11}"
        )
    bars = f"bar {BAR} ({STEEPER} where n^1.5 is claimed)"
    return [*lines, f"exponents of time over length, {bars}; first time: what the first call of a length takes more"]


def _exponent(row: dict[str, Any], what: str) -> str:
    found = row[what]["exponent"]
    if found is None:
        return units.DASH
    missed = row["bar"] is not None and found > row["bar"]
    return f"{found:.2f} ± {row[what]['error']:.2f}" + ("!" if missed else " ")


def _peers(rows: Sequence[dict[str, Any]]) -> list[str]:
    columns = f"{'theirs':>10} {'ours':>10} {'times faster':>16} {'projections aside':>18}"
    lines = [f"{'beside transformers':22} {'tokens':>7} {'':18} {columns}"]
    for row in rows:
        for name, found in row["ratios"].items():
            what, impl = name.split()
            theirs, mine = (units.seconds(row["seconds"][f"{what} {who}"]["median"]) for who in ("theirs", impl))
            ratio = f"{found['ratio']:.1f} (>= {found['bar']:.0f})" + ("!" if found["ratio"] < found["bar"] else " ")
            beyond = "-" if found["beyond_projections"] is None else f"{found['beyond_projections']:.1f}"
            lines.append(f"{row['name']:22} {row['tokens']:>7} {name:18} {theirs:>10} {mine:>10} {ratio:>16} {beyond:>18}")
    return lines


if __name__ == "__main__":
    print(table(run(only=sys.argv[1:])))
