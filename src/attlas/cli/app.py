"""The commands and their help. Nothing here loads torch: each command imports what it needs when it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from attlas._version import __version__
from attlas.cli.lab import bench_attention, bench_masks, bench_memory, bench_scaling, bench_scan, bench_serve, compare
from attlas.cli.options import lazy_command
from attlas.cli.output import guarded

app = typer.Typer(
    name="attlas",
    help="The attention atlas: look mechanisms up, draw them, ask what would run, compare them by measurement.",
    epilog="Every command takes --json (only JSON on stdout) and --help (with examples). Exit codes: 0, 1 when a check "
    "of a mechanism failed, 2 for a request that cannot be honoured, 130 after Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout, nothing else.")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Option of the mechanism; repeatable.")]


def version(asked: bool) -> None:
    if asked:
        print(f"attlas {__version__}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="The version.")] = False,
) -> None:
    pass


@app.command("list")
@guarded
def list_(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    level: Annotated[int | None, typer.Option(min=0, max=4, help="Only this level or higher.")] = None,
    supports: Annotated[list[str] | None, typer.Option(help="Only with this capability; repeat it to ask for several.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As the Markdown table of the README.")] = False,
    json: Json = False,
) -> None:
    """List the mechanisms of the catalogue.

    Levels: 0 described, 1 reference, 2 trainable mixer, 3 fast, 4 served.

    Examples:

        attlas list

        attlas list --family linear --level 3

        attlas list --supports causal --supports decode --json
    """
    from attlas.cli.catalogue import list_cards

    list_cards(family=family, level=level, supports=supports or [], markdown=markdown, as_json=json)


@app.command()
@guarded
def show(
    name: Annotated[str, typer.Argument(help="A mechanism: its name or an alias.")],
    size: Annotated[int, typer.Option(min=1, max=128, help="Tokens in the picture.")] = 24,
    json: Json = False,
) -> None:
    """Show one mechanism: formula, paper, cost, what it supports, its pattern, and the files that make it.

    Examples:

        attlas show sliding-window

        attlas show mqa

        attlas show causal --json
    """
    from attlas.cli.catalogue import show_card

    show_card(name, size=size, as_json=json)


@app.command()
@guarded
def draw(
    what: Annotated[str, typer.Argument(help="A mechanism, or a mask such as 'Causal() & Window.last(8)'.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File .svg, .png or .txt; default: the terminal.")] = None,
    size: Annotated[int, typer.Option(min=1, help="Tokens, queries and keys alike; a million is fine.")] = 32,
    option: Settings = None,
    json: Json = False,
) -> None:
    """Draw which keys each query may attend to: a row is a query, a column is a key.

    Examples:

        attlas draw sliding-window --set window=8

        attlas draw 'Causal() & Window.last(8) | Global([0])' --size 48

        attlas draw streaming -o streaming.svg --size 4096
    """
    from attlas.cli.drawing import draw_mask

    draw_mask(what, output=output, size=size, pairs=option or [], as_json=json)


def question() -> Callable[..., None]:
    from attlas.cli.explain import build

    return build()


def request() -> Callable[..., None]:
    from attlas.cli.generate import build

    return build()


def server() -> Callable[..., None]:
    from attlas.cli.serve import build

    return build()


def conversation() -> Callable[..., None]:
    from attlas.cli.chat import build

    return build()


@app.command(cls=lazy_command(question))
def explain() -> None:
    """Ask which implementation of attention would run for a call, and why each other one would not.

    No tensor of the asked size is made, so any size can be asked for.

    Examples:

        attlas explain --q-len 4096 --heads 32 --kv-heads 8 --head-dim 128 --mask 'Causal()'

        attlas explain --shape 2,1,32,128 --k-len 8192 --dtype bfloat16

        attlas explain --q-len 512 --mask 'Causal() & Window.last(64)' --lse --json
    """


app.command("compare", cls=lazy_command(compare), help=compare.__doc__)(lambda: None)

bench = typer.Typer(no_args_is_help=True, help="Measure one thing in depth; the result is checked before anything is timed.")
app.add_typer(bench, name="bench")
bench.command("masks", cls=lazy_command(bench_masks), help=bench_masks.__doc__)(lambda: None)
bench.command("attention", cls=lazy_command(bench_attention), help=bench_attention.__doc__)(lambda: None)
bench.command("memory", cls=lazy_command(bench_memory), help=bench_memory.__doc__)(lambda: None)
bench.command("scan", cls=lazy_command(bench_scan), help=bench_scan.__doc__)(lambda: None)
bench.command("scaling", cls=lazy_command(bench_scaling), help=bench_scaling.__doc__)(lambda: None)
bench.command("serve", cls=lazy_command(bench_serve), help=bench_serve.__doc__)(lambda: None)


@app.command(cls=lazy_command(request))
def generate() -> None:
    """Continue prompts: with a local model, or with random weights to see a mechanism run.

    Prompts are independent: none changes what another one gets.

    Examples:

        attlas generate 'Once upon a time' --model models/tiny-llama --new-tokens 64

        attlas generate 'Once' 'Twice' --model model.gguf --temperature 0.8 --top-p 0.95

        attlas generate 'any text' --mechanism sliding-window --set window=16 --json
    """


@app.command(cls=lazy_command(conversation))
def chat() -> None:
    """Talk to a local model in the terminal; Ctrl-C stops an answer, not the chat.

    Examples:

        attlas chat --model models/tiny-llama

        attlas chat --model model.gguf --system 'Answer in one sentence.' --temperature 0.3
    """


@app.command(cls=lazy_command(server))
def serve() -> None:
    """Serve a model with the OpenAI API: chat, completions, tokens, metrics, and a page that shows the cache.

    Listens on this machine alone unless told otherwise. --json prints the address as JSON once it is bound.

    Examples:

        attlas serve --model models/tiny-llama

        attlas serve --model model.gguf --host 0.0.0.0 --port 8080 --api-key one --api-key two

        ATTLAS_API_KEY=secret attlas serve --model model.gguf --max-running 64 --cache-mib 4096 --json
    """
