"""`attlas compare` and `attlas bench`: the lab's options as options of the command line. The lab is loaded when one runs."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attlas.lab.options import CompareOptions
    from attlas.lab.results import Results


def compare() -> Callable[..., None]:
    """Train, time and measure mechanisms side by side on this machine, and write tables, plots and a report.

    Results go to attlas-results/; a comparison that is interrupted goes on where it stopped when it is started again.

    Examples:

        attlas compare

        attlas compare causal sliding-window:window=64 linear-transformer --minutes 10

        attlas compare causal multi-query --stages speed,cache --lengths 512,1024,2048 --json
    """
    from attlas.cli.options import from_dataclass
    from attlas.lab.options import CompareOptions

    return from_dataclass(lambda: CompareOptions, run_compare)()


def run_compare(options: CompareOptions, as_json: bool) -> None:
    import typer

    from attlas.cli.output import note, write_json
    from attlas.lab.compare import run

    results = run(options)
    if as_json:
        write_json(results.to_dict())
    else:
        summarise(results)
    for stage, what, why in results.failures():
        note(f"{stage}: {what}: {why}")
    if results.red():
        raise typer.Exit(1)


# Column of the summary -> (field of the results' rows, how it is written).
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("parameters", lambda n: f"{n:,.0f}"),
    "bits/byte": ("bits_per_byte", lambda x: f"{x:.3f}"),
    "recall": ("recall", lambda x: f"{100 * x:.1f} %"),
    "at length": ("length", lambda n: f"{n:,.0f}"),
    "prefill ms": ("prefill_seconds", lambda s: f"{1e3 * s:.2f}"),
    "x causal": ("prefill_to_causal", lambda x: f"{x:.2f}"),
    "train ms": ("train_seconds", lambda s: f"{1e3 * s:.2f}"),
    "decode ms": ("decode_seconds", lambda s: f"{1e3 * s:.3f}"),
    "cache KiB": ("cache_bytes", lambda n: f"{n / 1024:,.1f}"),
}


def summarise(results: Results) -> None:
    """One row a mechanism with what was measured, and where the rest lies."""
    from attlas.cli.output import show, table

    rows = results.rows()
    columns = [title for title, (field, _) in COLUMNS.items() if any(row[field] is not None for row in rows)]
    cells = [[cell(row, title) for title in columns] for row in rows]
    show(table(("mechanism", *columns, "status"), [(r["mechanism"], *c, r["status"]) for r, c in zip(rows, cells, strict=True)]))
    print(f"\nreport: {results.report}\ndata:   {results.folder / 'results.json'}, {results.folder / 'results.csv'}")


def cell(row: dict[str, Any], title: str) -> str:
    field, written = COLUMNS[title]
    return "-" if row[field] is None else written(row[field])


def bench_masks() -> Callable[..., None]:
    """Time the compilation of masks to block maps, against FlexAttention's, and say what it needs.

    Examples:

        attlas bench masks

        attlas bench masks --tokens 65536 --peer-tokens 4096 --no-rss --json
    """
    return bench("attlas.lab.bench_masks")


def bench_attention() -> Callable[..., None]:
    """Time attention on the CPU against SDPA, FlexAttention, the naive formula and what the machine can do.

    Examples:

        attlas bench attention

        attlas bench attention --only 'short rows' --only decode --no-flex --json
    """
    return bench("attlas.lab.bench_cpu")


def bench_memory() -> Callable[..., None]:
    """Measure the peak memory of one training step of attention, against the bytes of q, k, v and out.

    Examples:

        attlas bench memory

        attlas bench memory --tokens 8192 --impls blocked --json
    """
    return bench("attlas.lab.bench_memory")


def bench_scaling() -> Callable[..., None]:
    """Long sequences: growth of time with length, Longformer and BigBird beside transformers, decoding from a latent.

    Examples:

        attlas bench scaling

        attlas bench scaling --only longformer --only bigbird --parts peers

        attlas bench scaling --parts growth --lengths 1024,2048,4096,8192 --picture growth.html --json
    """
    return bench("attlas.lab.bench_scaling")


def bench_scan() -> Callable[..., None]:
    """The linear recurrence and the long convolution: share of the matrix product's rate, growth with length, cost of a decode
    step.

    Examples:

        attlas bench scan

        attlas bench scan --tokens 4096 --repeats 3 --json
    """
    return bench("attlas.lab.bench_scan")


def bench_serve() -> Callable[..., None]:
    """Serving beside transformers and llama.cpp: one request, many at once, a shared prefix, goodput, and what must cost nothing.

    Rows: decode one (seconds a token), mixed batch (requests of mixed lengths that are there at once), shared prefix (requests
    that begin alike, and the wait for the first token), goodput (conversations with Poisson arrivals: how many a second get their
    tokens in time), no hits (what looking for prefixes costs that never come), cancelled (what is left behind).

    Nothing is timed before the tokens agree with those of transformers. llama.cpp takes part where `llama-server` is on PATH or
    llama-cpp-python is installed, with the same weights in 16 bits. A figure with a bar is followed by it, and by ! where it is
    missed; the bars are for SmolLM2 in bfloat16 on an idle machine. All rows take about ten minutes on two cores; Ctrl-C ends
    the run with the rows that are done.

    Examples:

        attlas bench serve

        attlas bench serve --only 'shared prefix' --only 'no hits' --dtype bfloat16,float32 --json

        attlas bench serve --only goodput --rates 0.5,1,2 --seconds 60 --picture goodput.html

        attlas bench serve --model tiny
    """
    return bench("attlas.lab.bench_serve")


def bench(module: str) -> Callable[..., None]:
    """A command with the keyword parameters of the module's `run` as options, that shows what its `table` makes of the result."""
    import typer

    from attlas.cli.options import from_dataclass, options_of
    from attlas.cli.output import note, write_json

    lab = import_module(module)

    def action(options: Any, as_json: bool) -> None:
        try:
            result = lab.run(**vars(options))
        except AssertionError as wrong:  # a result was wrong, so nothing was timed
            note(f"attlas: {wrong}")
            raise typer.Exit(1) from None
        if as_json:
            write_json(result)
        else:
            print(lab.table(result))
        if result.get("interrupted"):
            raise typer.Exit(130)

    return from_dataclass(lambda: options_of(lab.run), action)()
