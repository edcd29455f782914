"""`attlas serve`: a model behind the OpenAI API."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attlas.cli.options import from_dataclass
from attlas.cli.output import note

if TYPE_CHECKING:
    from attlas.serve.options import ServeOptions


def build() -> Callable[..., None]:
    from attlas.serve.options import ServeOptions

    return from_dataclass(lambda: ServeOptions, serve)()


def serve(options: ServeOptions, as_json: bool) -> None:
    from attlas.serve.run import run

    def started(told: dict[str, Any]) -> None:
        if as_json:
            print(json.dumps(told), flush=True)
            return
        if options.model is None:
            note("The weights are random, so the text is noise. A real model: --model FOLDER or --model FILE.gguf")
        keys = "with keys" if told["keys"] else "without keys"
        print(f"{told['model']} at {told['url']} ({keys}); Ctrl-C finishes what is running and ends", flush=True)

    if options.model is not None and not as_json:
        note(f"Loading {options.model} ...")
    run(options, started)
