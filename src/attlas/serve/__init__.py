"""The HTTP server: the OpenAI API in front of an engine, with keys, limits, metrics and a page that shows the cache at work."""

from attlas.serve.options import Limits, ServeOptions
from attlas.serve.worker import Worker

__all__ = ["Limits", "ServeOptions", "Worker"]
