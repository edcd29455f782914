"""`attlas draw`, and the picture of `attlas show`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attlas.catalogue.card import Card
from attlas.catalogue.index import card
from attlas.cli.output import save, write_json
from attlas.cli.parse import parse_mask, settings
from attlas.cli.picture import png
from attlas.errors import OptionError, UnsupportedError
from attlas.masks import draw
from attlas.masks.expr import Mask

KINDS = (".svg", ".png", ".txt")
PNG_PIXELS = 512  # a PNG is about this wide: small masks get large cells


def pattern_of(c: Card, options: dict[str, object] | None = None) -> Mask | None:
    """The mask that a mechanism works with: the card's own picture, or with options that of the mixer they make."""
    if c.pattern is not None and not options:
        return c.pattern
    if not c.mixer:
        return None
    sizes = {name: size for name, size in (("dim", 64), ("num_heads", 4)) if name in c.options}
    found: Mask | None = c.build(**{**sizes, **c.example, **(options or {})}).describe_mask()
    return found


def mask_of(what: str, pairs: Sequence[str]) -> Mask:
    """A mask from an expression, or from the name of a mechanism and its options."""
    if "(" in what:
        if pairs:
            raise OptionError(f"--set {pairs[0]}: --set goes with a mechanism's name; a mask has its options in brackets")
        return parse_mask(what)
    c = card(what)
    mask = pattern_of(c, settings(pairs))
    if mask is None:
        raise UnsupportedError(f"{c.name} is not a fixed mask, so there is nothing to draw; see: attlas show {c.name}")
    return mask


def draw_mask(what: str, *, output: Path | None, size: int, pairs: Sequence[str], as_json: bool) -> None:
    if output is not None and output.suffix.lower() not in KINDS:
        raise OptionError(f"-o {output}: the file's name must end in one of {', '.join(KINDS)}")
    mask = mask_of(what, pairs)
    if output is not None:
        save(output, content(mask, size, output.suffix.lower()))
    if as_json:
        allowed = mask.count((size, size))
        planes = (mask.batch or 1) * (mask.heads or 1)
        found = {"mask": repr(mask), "size": size, "allowed": allowed, "pairs": size * size * planes, "file": output}
        write_json(found if output else {**found, "rows": rows_of(mask, size)})
    elif output is None:
        print(draw.text(mask, size))
    else:
        print(f"{output}: {mask!r}, {size} x {size}")


def rows_of(mask: Mask, size: int) -> list[str]:
    """The mask as lines of 1 and 0; masks that differ by batch row or head one after the other."""
    planes = mask.to_bool(size, size).reshape(-1, size).tolist()
    return ["".join("01"[on] for on in row) for row in planes]


def content(mask: Mask, size: int, suffix: str) -> str | bytes:
    if suffix == ".svg":
        return draw.svg(mask, size)
    if suffix == ".txt":
        return draw.text(mask, size) + "\n"
    return png(mask.to_bool(size, size).reshape(-1, size).tolist(), max(1, PNG_PIXELS // size))
