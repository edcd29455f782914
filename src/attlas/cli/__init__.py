"""The command line, `attlas`: look mechanisms up, draw them, ask what would run, compare, generate."""

from attlas.cli.entry import main

__all__ = ["main"]
