"""`attlas draw`, and the picture of `attlas show`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attlas.catalogue.card import Card
from attlas.catalogue.index import card
from attlas.cli.output import save, write_json
from attlas.cli.parse import parse_mask, settings
from attlas.cli.picture import png
from attlas.errors import OptionError, UnsupportedError
from attlas.masks import draw
from attlas.masks.expr import Mask

KINDS = (".svg", ".png", ".txt")
PIXELS = 512  # a PNG is about this wide: small masks get large cells
CELLS = 64  # per side of a drawing as data


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
        write_json(described(mask, size, output))
    else:
        print(draw.to_text(mask, size, size) if output is None else f"{output}: {mask!r}, {size} tokens")


def described(mask: Mask, size: int, output: Path | None) -> dict[str, Any]:
    """The drawing as data; `cells` holds the share of allowed pairs in each cell, 0 or 1 where a cell is a pair."""
    planes = (mask.batch or 1) * (mask.heads or 1)
    cells = draw.pattern(mask, size, size, *(2 * [min(size, CELLS)]))
    pairs = size * size * planes
    return {"mask": repr(mask), "size": size, "allowed": mask.count((size, size)), "pairs": pairs, "cells": cells, "file": output}


def content(mask: Mask, size: int, suffix: str) -> str | bytes:
    if suffix == ".svg":
        return draw.to_svg(mask, size, size)
    if suffix == ".txt":
        return draw.to_text(mask, size, size) + "\n"
    side = min(size, PIXELS)
    return png(draw.pattern(mask, size, size, side, side), max(1, PIXELS // size))
