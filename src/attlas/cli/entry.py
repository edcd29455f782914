"""Where the `attlas` script starts. Needs only the standard library until it knows that the command line's extra is there."""

from __future__ import annotations

import sys

INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C


def main() -> int:
    """Run the command line on sys.argv. Returns the exit code: 0, 1 when a check failed, 2 for a request that cannot be
    honoured, 130 after Ctrl-C."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"The command line needs {error.name}: pip install 'attlas[cli]'", file=sys.stderr)
        return 2
    try:
        from attlas.cli.app import app

        app(prog_name="attlas")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
