"""The serving engine: many requests share one model, one cache and one forward per step."""

from attlas.engine.engine import Engine
from attlas.engine.options import EngineOptions
from attlas.engine.request import EngineStats, Output, SamplingParams, TokenLogprobs
from attlas.engine.tokenizer import ChatTemplate, Tokenizer
from attlas.engine.tokenizer_files import load_tokenizer

__all__ = [
    "ChatTemplate",
    "Engine",
    "EngineOptions",
    "EngineStats",
    "Output",
    "SamplingParams",
    "TokenLogprobs",
    "Tokenizer",
    "load_tokenizer",
]
