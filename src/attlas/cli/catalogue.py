"""`attlas list` and `attlas show`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attlas.catalogue.card import LEVELS, Card
from attlas.catalogue.index import card, cards
from attlas.cli.drawing import pattern_of
from attlas.cli.output import literal, show, table, write_json
from attlas.masks.draw import to_text
from attlas.registry import load_attr

LETTERS = "n tokens; d width of all heads together, d_h of one head; h heads; unless the line says otherwise"
SHARED = ("rope", "score_mod", "qk_norm", "attend")
SHARED_AT = "attlas.nn.attention.Attention"


def list_cards(*, family: str | None, level: int | None, supports: Sequence[str], markdown: bool, as_json: bool) -> None:
    found = cards(family=family, supports=supports, min_level=level or 0)
    if as_json:
        write_json([c.to_dict() for c in found])
    elif markdown:
        print(markdown_table(found), end="")
    else:
        columns = ("name", "family", "level", "what", "supports")
        rows = [(c.name, c.family, f"{c.level} {LEVELS[c.level]}", c.summary, " ".join(sorted(c.supports))) for c in found]
        show(table(columns, rows))
        print(f"\n{len(found)} mechanism{'' if len(found) == 1 else 's'}. More on one: attlas show NAME")


def markdown_table(found: Iterable[Card]) -> str:
    """The catalogue as a Markdown table, one row a card."""
    lines = ["| mechanism | family | what | time | cache | supports | level |", "|---|---|---|---|---|---|---|"]
    for c in found:
        cells = (f"`{c.name}`", c.family, c.summary, c.time, c.cache, ", ".join(sorted(c.supports)), str(c.level))
        lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def where(path: str) -> dict[str, Any] | None:
    """File (inside the package) and line of "module:attr", following re-exports. None for an empty path."""
    if not path:
        return None
    found = inspect.unwrap(load_attr(path))
    if not hasattr(found, "__code__") and not isinstance(found, type):
        found = type(found)
    _, line = inspect.getsourcelines(found)
    file = Path(inspect.getsourcefile(found) or "")
    package = Path(__file__).resolve().parents[2]
    inside = file.resolve().relative_to(package) if file.resolve().is_relative_to(package) else Path(file.name)
    return {"name": path, "file": inside.as_posix(), "line": line}


def show_card(name: str, *, size: int, as_json: bool) -> None:
    c = card(name)
    files = {kind: where(getattr(c, kind)) for kind in ("reference", "op", "mixer")}
    mask = pattern_of(c)
    picture = None if mask is None else to_text(mask, size, size)
    if as_json:
        write_json({**c.to_dict(), "signature": c.signature(), "about": about(c), "files": files, "picture": picture})
        return
    facts = [
        ("formula", c.formula),
        ("paper", c.paper),
        ("also called", ", ".join(c.aliases)),
        ("used by", ", ".join(c.used_by)),
        ("family", c.family),
        ("level", f"{c.level} {LEVELS[c.level]}"),
        ("time", c.time),
        ("memory", c.memory),
        ("cache", c.cache),
        ("supports", ", ".join(sorted(c.supports))),
        ("build", build_line(c)),
        ("options", options_line(c)),
    ]
    facts += [("beware" if i == 0 else "", caveat) for i, caveat in enumerate(c.caveats)]
    facts += [(kind, f"{at['file']}:{at['line']}  {at['name']}") for kind, at in files.items() if at]
    rows = table(("", ""), [(label, value) for label, value in facts if value])
    rows.show_header = False
    show(f"[bold]{literal(c.name)}[/bold]  {literal(c.summary)}\n", rows)
    print(f"\n{LETTERS}")
    if text := about(c):
        print(f"\n{text}")
    if any(name in SHARED for name in c.options):
        print(f"\nOptions that softmax mechanisms share are described at {SHARED_AT}.")
    if picture is not None:
        print(f"\n{picture}")


def about(c: Card) -> str:
    """What the mechanism's factory says of itself and of its options, with their units."""
    return "" if not c.mixer else inspect.getdoc(load_attr(c.mixer)) or ""


def build_line(c: Card) -> str:
    """`attlas.build('sliding-window', dim=..., num_heads=..., window=...)`: what has to be given."""
    needed = [name for name, p in c.options.items() if p.default is p.empty]
    return f"attlas.build({c.name!r}, {', '.join(f'{name}=...' for name in needed)})"


def options_line(c: Card) -> str:
    """The options with defaults, as they would be written."""
    given = {name: p.default for name, p in c.options.items() if p.default is not p.empty}
    return ", ".join(f"{name}={getattr(value, '__name__', None) or repr(value)}" for name, value in given.items())
