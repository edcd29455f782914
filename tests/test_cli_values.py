"""From text to values: mask expressions, settings, and options that are the fields of a dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import typer
from typer.testing import CliRunner, Result

from attlas.cli.options import from_dataclass, lazy_command
from attlas.cli.output import plain
from attlas.cli.parse import constructors, parse_mask, settings
from attlas.errors import OptionError
from attlas.masks import Causal, Global, PerHead, Prefix, Window

# ---- mask expressions


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        ("Causal()", Causal()),
        ("Causal() & Window.last(8) | Global([0, 3])", Causal() & Window.last(8) | Global([0, 3])),
        ("~(Causal(align='start') | Prefix(5))", ~(Causal(align="start") | Prefix(5))),
        ("Window(left=3, right=None)", Window(3, None)),
        ("PerHead((Causal(), Window(1, -0)))", PerHead((Causal(), Window(1, 0)))),
    ],
)
def test_masks_are_read(text: str, mask: object):
    assert parse_mask(text) == mask
    assert parse_mask(repr(mask)) == mask


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Causal",
        "Causal() &",
        "Causal() and Window(1, 1)",
        "Causal() & 3",
        "~3",
        "3",
        "Window()",
        "Window(*[1, 2])",
        "Window(**{'left': 1})",
        "__import__('os').getcwd()",
        "Causal().__class__",
        "().__class__.__bases__",
        "(lambda: 0)()",
        "[m for m in ()]",
        "Causal.__init__()",
        "Window.last.__globals__",
        "Dense([[True]])",
        "Mask()",
        "f'{Causal()}'",
        "(" * 3000,
        "~" * 3999 + "3",
        "9" * 5000,
    ],
)
def test_what_is_no_mask_is_refused(text: str):
    with pytest.raises(OptionError):
        parse_mask(text)


def test_only_masks_can_be_called():
    known = constructors()
    assert {"Causal", "Window", "Window.last", "PerHead"} <= known.keys()
    assert not {"Mask", "Dense", "BlockMap", "Grid", "Axis", "Segment"} & known.keys()


def test_settings_are_literals_masks_or_text():
    given = ["window=64", "causal=False", "form=chunk", "scale=1e-3", "tokens=(0, 3)", "mask=Causal()"]
    wanted = {"window": 64, "causal": False, "form": "chunk", "scale": 1e-3, "tokens": (0, 3), "mask": Causal()}
    assert settings(given) == wanted


# ---- options from dataclasses


@dataclass(frozen=True)
class Recipe:
    """How to make a thing.

    names    which ones
    steps    how many,
             and then some
    colour   of the result
    """

    names: tuple[str, ...] = ()
    steps: int = 3
    rate: float = 0.5
    colour: Literal["red", "blue"] = "red"
    limit: int | None = None
    sizes: tuple[int, ...] = (2, 3)
    out: Path | None = None
    quick: bool = False
    extra: str = field(default="x", metadata={"help": "said here"})


def recipe(*arguments: str) -> tuple[Result, list[tuple[Recipe, bool]]]:
    made: list[tuple[Recipe, bool]] = []
    little = typer.Typer(add_completion=False)
    little.command("make", cls=lazy_command(from_dataclass(lambda: Recipe, lambda r, j: made.append((r, j)))))(lambda: None)
    little.command("other")(lambda: None)
    return CliRunner().invoke(little, ["make", *arguments]), made


def test_fields_become_options():
    done, made = recipe()
    assert done.exit_code == 0 and made == [(Recipe(), False)], done.output
    done, made = recipe(
        *("a", "b", "--steps", "7", "--rate", "0.25", "--colour", "blue", "--limit", "5", "--sizes", "5,7", "--sizes", "11"),
        *("--out", "there", "--quick", "--extra", "y", "--json"),
    )
    assert done.exit_code == 0, done.output
    assert made == [(Recipe(("a", "b"), 7, 0.25, "blue", 5, (5, 7, 11), Path("there"), True, "y"), True)]


def test_fields_help_comes_from_the_docstring():
    text = " ".join(recipe("--help")[0].stdout.replace("│", " ").split())
    for words in ("which ones", "how many, and then some.", "said here.", "One of: red, blue", "Default: 2, 3"):
        assert words in text, words


@pytest.mark.parametrize(
    ("arguments", "says"), [(("--colour", "blu"), "'blue'"), (("--sizes", "2,x"), "int"), (("--steps", "x"), "steps")]
)
def test_fields_refuse(arguments: tuple[str, ...], says: str):
    done, made = recipe(*arguments)
    assert done.exit_code == 2 and not made
    assert says in done.stderr


def test_json_holds_no_nan():
    assert plain({"a": float("nan"), "b": (float("-inf"), 1.5, None, True), "c": Path("x")}) == {
        "a": "nan",
        "b": ["-inf", 1.5, None, True],
        "c": "x",
    }
