"""Rewrite the generated parts of README.md: `python docs/refresh.py`. A test fails while they are not current."""

from __future__ import annotations

import re
from pathlib import Path

from attlas.catalogue.index import cards
from attlas.cli.catalogue import markdown_table

README = Path(__file__).resolve().parents[1] / "README.md"


def with_section(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers NAME:begin and NAME:end replaced."""
    pattern = rf"(<!-- {name}:begin[^>]*-->\n).*?(<!-- {name}:end -->)"
    new, found = re.subn(pattern, lambda m: m[1] + content + m[2], text, flags=re.S)
    assert found == 1, f"README.md needs one pair of markers {name}:begin, {name}:end"
    return new


if __name__ == "__main__":
    README.write_text(with_section(README.read_text(encoding="utf-8"), "catalogue", markdown_table(cards())), encoding="utf-8")
