"""Numbers as people read them."""

from __future__ import annotations

import math

NUMBER_WORDS = (
    "no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
DASH = "–"


def digits(value: float, figures: int = 3) -> str:
    """`figures` significant digits, never in exponent form: 0.01234 -> '0.0123', 1234 -> '1,234'."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    rounded = float(f"{value:.{figures - 1}e}")  # 0.9996 will have one digit before the point
    places = max(0, figures - 1 - math.floor(math.log10(abs(rounded))))
    return f"{value:,.{places}f}"


def seconds(value: float | None, figures: int = 3) -> str:
    """0.0123 -> '12.3 ms'."""
    if value is None:
        return DASH
    for limit, factor, unit in ((0.9995e-3, 1e6, "µs"), (0.9995, 1e3, "ms")):
        if value < limit:
            return f"{digits(value * factor, figures)} {unit}"
    return f"{digits(value, figures)} s"


def short_seconds(value: float) -> str:
    """A tick at a round number: 0.002 -> '2 ms', 0.0015 -> '1.5 ms'."""
    number, _, unit = seconds(value, 2).partition(" ")
    return f"{number.removesuffix('.0')} {unit}"


def nbytes(value: float | None) -> str:
    """2048 -> '2 KiB'."""
    if value is None:
        return DASH
    for limit, factor, unit in ((1024, 1, "B"), (1 << 20, 1 << 10, "KiB"), (1 << 30, 1 << 20, "MiB")):
        if value < limit:
            return f"{value / factor:.3g} {unit}" if value / factor < 1000 else f"{value / factor:,.0f} {unit}"
    return f"{value / (1 << 30):.3g} GiB"


def times(value: float | None) -> str:
    """A ratio: 0.25 -> '0.25×'."""
    return DASH if value is None else f"{digits(value, 2)}×"


def percent(value: float | None, places: int = 1) -> str:
    return DASH if value is None else f"{100 * value:.{places}f} %"


def fixed(value: float | None, places: int = 3) -> str:
    return DASH if value is None else f"{value:.{places}f}"


def signed(value: float | None, places: int = 3) -> str:
    """A difference, with a real minus: -0.12 -> '−0.120'."""
    return DASH if value is None else f"{value:+.{places}f}".replace("-", "−")


def count(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"


def words(number: int) -> str:
    """3 -> 'three', 40 -> '40'."""
    return NUMBER_WORDS[number] if 0 <= number < len(NUMBER_WORDS) else f"{number:,}"


def listed(items: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1] if items else ""
