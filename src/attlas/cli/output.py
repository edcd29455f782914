"""How commands speak: a table or JSON to stdout, errors as one sentence to stderr, and the exit codes."""

from __future__ import annotations

import functools
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attlas.cli.entry import INTERRUPTED
from attlas.errors import AttlasError

# What to install when a library is missing: import name -> extra of the package.
EXTRA_OF = {
    "numpy": "lab",
    "plotly": "lab",
    "matplotlib": "lab",
    "safetensors": "weights",
    "gguf": "weights",
    "tokenizers": "weights",
    "fastapi": "serve",
    "jinja2": "serve",
    "llguidance": "serve",
    "pydantic": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "transformers": "test",
}


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinities become strings ("nan", "inf", "-inf"), anything unknown its text."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return [plain(v) for v in sorted(value)]
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    return str(value)


def write_json(value: Any) -> None:
    """The one thing that a command with --json writes to stdout."""
    sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def show(*things: Any) -> None:
    """Print to stdout; text may hold markup. Off a terminal no line is wrapped or padded, so that pipes get what they expect."""
    here = Console(highlight=False)
    if here.is_terminal:
        for thing in things:
            here.print(thing)
        return
    wide = Console(highlight=False, width=10_000, file=io.StringIO())
    with wide.capture() as captured:
        for thing in things:
            wide.print(thing)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]], *, title: str | None = None) -> Table:
    """A plain table; cells are text, not markup."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in columns:
        made.add_column(name, overflow="fold")
    for row in rows:
        made.add_row(*(literal(cell) for cell in row))
    return made


def literal(cell: Any) -> str:
    """`cell` as text in which rich sees no markup: "[B, T]" must not be read as a style."""
    return escape("" if cell is None else str(cell))


def note(sentence: str) -> None:
    """A sentence for the person at the terminal; stderr, so that it never mixes with data."""
    print(sentence, file=sys.stderr)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The same command, with what a user can do wrong reported in a sentence (exit 2) and Ctrl-C in a line (exit 130)."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except AttlasError as error:
            note(f"attlas: {error}")
            raise typer.Exit(2) from None
        except ModuleNotFoundError as error:
            extra = EXTRA_OF.get((error.name or "").split(".")[0])
            if extra is None:
                raise
            note(f"attlas: this needs {error.name}: pip install 'attlas[{extra}]'")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            note("Interrupted.")
            raise typer.Exit(INTERRUPTED) from None

    return run


def save(path: Path, content: str | bytes) -> None:
    """Write a file that the user asked for, making its folder; a failure is a sentence, not a traceback."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise AttlasError(f"cannot write {path}: {error.strerror or error}") from error
