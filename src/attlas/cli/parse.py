"""Text from the command line -> values. Nothing is evaluated: the syntax tree is walked with a list of what it may hold."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from attlas.errors import OptionError
from attlas.registry import suggest

if TYPE_CHECKING:
    from attlas.masks.expr import Mask

LONGEST = 4000  # characters of a mask expression; far beyond anything typed, and shallow enough for the parser's recursion


def mask_names() -> dict[str, type[Mask]]:
    """The masks that can be written as text: all but Dense, which holds a tensor."""
    import attlas.masks
    from attlas.masks.expr import Mask

    found = {name: getattr(attlas.masks, name) for name in attlas.masks.__all__}
    return {n: c for n, c in found.items() if isinstance(c, type) and issubclass(c, Mask) and c is not Mask and n != "Dense"}


def constructors() -> dict[str, Any]:
    """What may be called: the mask classes, and the class methods that build one ("Window.last")."""
    made: dict[str, Any] = {}
    for name, cls in mask_names().items():
        made[name] = cls
        own = (m for m, value in vars(cls).items() if isinstance(value, classmethod) and not m.startswith("_"))
        made.update({f"{name}.{m}": getattr(cls, m) for m in own})
    return made


def parse_mask(text: str) -> Mask:
    """A mask from its own notation, `Causal() & Window.last(8) | Global([0])`, as `repr` writes it.

    Allowed are the names of attlas.masks, their literal arguments, `&`, `|`, `~` and brackets. Raises OptionError saying which
    part is not understood.
    """
    from attlas.masks.expr import Mask
    from attlas.masks.options import shorten

    if len(text) > LONGEST:
        raise OptionError(f"a mask of {len(text)} characters; at most {LONGEST} are read from text")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        mask = value_of(tree.body, constructors())
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise OptionError(f"cannot read the mask {shorten(text)}: {getattr(error, 'msg', None) or 'too deeply nested'}") from None
    if not isinstance(mask, Mask):
        raise OptionError(f"{text!r} is {type(mask).__name__}, not a mask; a mask is written like 'Causal() & Window.last(8)'")
    return mask


def value_of(node: ast.expr, known: dict[str, Any]) -> Any:
    """The value of one node of the tree: a mask, or a literal argument."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
        left, right = masks_of([node.left, node.right], known)
        return left & right if isinstance(node.op, ast.BitAnd) else left | right
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~masks_of([node.operand], known)[0]
    if isinstance(node, ast.Call):
        return called(node, known)
    if isinstance(node, ast.Tuple | ast.List):
        items = [value_of(item, known) for item in node.elts]
        return tuple(items) if isinstance(node, ast.Tuple) else items
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = value_of(node.operand, known)
        if isinstance(number, int | float):
            return -number
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str | None):
        return node.value
    if isinstance(node, ast.Name) and node.id in known:
        raise OptionError(f"{node.id} is written with brackets: {usage(node.id, known)}")
    if isinstance(node, ast.Name):
        raise unknown(node.id, known)
    raise OptionError(f"{ast.unparse(node)!r} has no place in a mask; a mask is written like 'Causal() & ~Window.last(8)'")


def masks_of(nodes: Iterable[ast.expr], known: dict[str, Any]) -> list[Mask]:
    from attlas.masks.expr import Mask

    found = []
    for node in nodes:
        value = value_of(node, known)
        if not isinstance(value, Mask):
            raise OptionError(f"{ast.unparse(node)!r} is no mask: &, | and ~ join masks")
        found.append(value)
    return found


def called(node: ast.Call, known: dict[str, Any]) -> Any:
    name = ast.unparse(node.func)
    if name not in known:
        raise unknown(name, known)
    if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
        raise OptionError(f"{ast.unparse(node)!r}: * and ** have no place in a mask")
    args = [value_of(a, known) for a in node.args]
    options = {str(k.arg): value_of(k.value, known) for k in node.keywords}
    try:
        return known[name](*args, **options)
    except TypeError:
        raise OptionError(f"{ast.unparse(node)!r}: {name} is written {usage(name, known)}") from None


def usage(name: str, known: dict[str, Any]) -> str:
    """`Window(left, right)`: how a constructor is called, without types."""
    parameters = inspect.signature(known[name]).parameters.values()
    return f"{name}({', '.join(str(p.replace(annotation=p.empty)) for p in parameters)})"


def unknown(name: str, known: dict[str, Any]) -> OptionError:
    return OptionError(f"unknown mask {name!r}; {suggest(name, known)}")


def settings(pairs: Iterable[str]) -> dict[str, Any]:
    """`window=64`, `causal=False`, `form=chunk` -> values: Python literals where they parse as such, masks, else text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip().isidentifier():
            raise OptionError(f"--set takes NAME=VALUE, got {pair!r}")
        found[name.strip()] = setting(text.strip())
    return found


def setting(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return parse_mask(text) if "(" in text else text
