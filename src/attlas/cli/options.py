"""Options of a command that are the fields of a dataclass, read when somebody first asks for them.

The lab's options are dataclasses in modules that need torch; `attlas --help` must not load it. So a command made by
`from_dataclass` is registered with its name and its help only, and gets its options when it runs or when its own help is shown.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from attlas.cli.output import guarded
from attlas.errors import OptionError
from attlas.registry import suggest

SIMPLE = (bool, int, float, str, Path)


def lazy_command(build: Callable[[], Callable[..., None]]) -> type[TyperCommand]:
    """A command class whose options and action are those of the function that `build()` returns, fetched on first need."""

    class LazyCommand(TyperCommand):
        def get_params(self, ctx: Any) -> Any:
            if not getattr(self, "_built", False):
                inner = typer.Typer(add_completion=False)
                inner.command()(build())
                made = typer.main.get_command(inner)
                self.params, self.callback, self._built = made.params, made.callback, True
            return super().get_params(ctx)

    return LazyCommand


def from_dataclass(load: Callable[[], type], action: Callable[..., None]) -> Callable[[], Callable[..., None]]:
    """For `lazy_command`: a function with one option for each field of the dataclass `load()`, calling `action(options, json)`.

    Help texts come from `field(metadata={"help": ...})`, else from lines "field  text" of the dataclass's docstring. Text for a
    Literal is checked with a did-you-mean. A tuple's option may be repeated or hold commas. Metadata of a field: "argument" makes
    it the command's arguments (as the name `names` does), "whole" forbids commas (as paths do), "flag" renames the option.
    """

    def build() -> Callable[..., None]:
        options = load()
        hints = get_type_hints(options)

        def command(**given: Any) -> None:
            as_json = given.pop("json")
            chosen = {f.name: from_text(f, hints[f.name], given[f.name]) for f in fields(options) if f.init}
            action(options(**{name: value for name, value in chosen.items() if value is not MISSING}), as_json)

        described = help_texts(options)
        parameters = [parameter(f, hints[f.name], described.get(f.name)) for f in fields(options) if f.init]
        parameters.append(json_parameter())
        wrapped = guarded(command)
        del wrapped.__wrapped__  # type: ignore[attr-defined]  # the signature below counts, not that of `command`
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapped

    return build


def options_of(function: Callable[..., Any]) -> type:
    """A dataclass with the keyword parameters of a function as fields, and its docstring as theirs."""
    hints = get_type_hints(function)
    found = inspect.signature(function).parameters.values()
    made = [(p.name, hints[p.name], field(default=MISSING if p.default is p.empty else p.default)) for p in found]
    return make_dataclass(f"{function.__name__}_options", made, namespace={"__doc__": function.__doc__}, frozen=True)


def json_parameter() -> inspect.Parameter:
    annotation = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout, nothing else.")]
    return inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)


def help_texts(options: type) -> dict[str, str]:
    """What the docstring says of each field: lines "name  text" (two blanks or more), and deeper lines that go on with it."""
    found: dict[str, str] = {}
    current, indent = None, 0
    for line in inspect.cleandoc(options.__doc__ or "").splitlines():
        head = re.match(r"( *)(\w+) {2,}(\S.*)", line)
        if head and head[2] in {f.name for f in fields(options)}:
            current, indent = head[2], len(head[1])
            found[current] = head[3]
        elif current and len(line) - len(line.lstrip()) > indent:
            found[current] += " " + line.strip()
        else:
            current = None
    return found


def is_argument(f: Field[Any]) -> bool:
    return f.name == "names" or "argument" in f.metadata


def has_commas(f: Field[Any], kind: Any) -> bool:
    return not (is_argument(f) or "whole" in f.metadata or kind is Path)


def flag(f: Field[Any]) -> str:
    return f.metadata.get("flag") or f"--{f.name.replace('_', '-')}"


def parameter(f: Field[Any], hint: Any, described: str | None) -> inspect.Parameter:
    """The command-line form of one field: a flag, a value, or for tuples an option that may be repeated."""
    kind, many = shape(hint)
    default = f.default_factory() if f.default_factory is not MISSING else f.default
    text = [f.metadata.get("help") or described or ""]
    if get_origin(kind) is Literal:
        text.append(f"One of: {', '.join(map(str, get_args(kind)))}.")
    annotation: Any = str if many or get_origin(kind) is Literal else kind
    if many:
        if not is_argument(f):
            text.append("Repeat it or separate by commas." if has_commas(f, kind) else "Repeat it for several.")
        if isinstance(default, tuple | list) and default and "(default" not in text[0]:
            text.append(f"Default: {', '.join(map(str, default))}.")
        annotation, default = list[annotation] | None, None
    elif default is None:
        annotation = annotation | None
    elif default is MISSING:
        default = inspect.Parameter.empty
    words = " ".join(sentence(t) for t in text if t) or None
    if is_argument(f):
        how: Any = typer.Argument(help=words, metavar=f"[{f.name.upper()}]...")
    else:
        off = f"--no-{flag(f)[2:]}" if default is True else ""
        how = typer.Option(f"{flag(f)}/{off}" if off else flag(f), help=words, metavar=f"<{word(kind)}>..." if many else None)
    return inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, how])


def word(kind: Any) -> str:
    return "name" if get_origin(kind) is Literal else kind.__name__.lower()


def sentence(text: str) -> str:
    """One line that ends with a full stop."""
    line = " ".join(text.split())
    return line if line.endswith((".", ")", "]")) else line + "."


def shape(hint: Any) -> tuple[Any, bool]:
    """(type of one value, may there be many): int | None -> (int, False); tuple[str, ...] -> (str, True)."""
    if get_origin(hint) in (Union, types.UnionType):
        rest = [a for a in get_args(hint) if a is not type(None)]
        many = [a for a in rest if shape(a)[1]]
        return shape(many[0] if many else rest[0])
    if get_origin(hint) in (tuple, list, Sequence):
        return shape(get_args(hint)[0])[0], True
    if get_origin(hint) is Literal:
        return hint, False
    return (hint, False) if hint in SIMPLE else (str, False)


def from_text(f: Field[Any], hint: Any, value: Any) -> Any:
    """The field's value from what the command line gave; MISSING where it gave nothing and the field's default holds."""
    kind, many = shape(hint)
    if not many:
        return value if value is None else one(f, kind, value)
    if not value:
        return MISSING
    texts = [str(text) for text in value]
    if has_commas(f, kind):
        texts = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    return tuple(one(f, kind, text) for text in texts)


def one(f: Field[Any], kind: Any, value: Any) -> Any:
    if get_origin(kind) is Literal:
        for choice in get_args(kind):
            if str(choice) == str(value):
                return choice
        raise OptionError(f"{flag(f)} {value}: {suggest(str(value), map(str, get_args(kind)))}")
    if isinstance(value, kind):
        return value
    try:
        return kind(value)
    except ValueError:
        raise OptionError(f"{flag(f)} takes {kind.__name__}, got {value!r}") from None
