"""From options to what a server serves: a local model, or a small random one that reads bytes."""

from __future__ import annotations

from pathlib import Path

from attlas.engine.engine import Engine
from attlas.engine.tokenizer import ChatTemplate, Tokenizer
from attlas.engine.tokenizer_files import load_tokenizer
from attlas.models.config import language_model
from attlas.models.load import dtype_of_weights, load_model, located
from attlas.models.transformer import Transformer
from attlas.serve.options import ServeOptions
from attlas.serve.service import Served

PLAIN_CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def load(options: ServeOptions) -> Served:
    """The model, its tokenizer and an engine around them."""
    dtype = dtype_of_weights(options.dtype)
    if options.model is None:
        model, tokenizer, name = random_model().to(dtype), byte_tokenizer(), "random"
    else:
        tokenizer = load_tokenizer(options.tokenizer or located(options.model))
        model, name = load_model(options.model, dtype=dtype), _name(options.model)
    return served(model.eval(), tokenizer, options, options.name or name)


def served(model: Transformer, tokenizer: Tokenizer, options: ServeOptions, name: str) -> Served:
    engine = Engine(model, tokenizer, options=options.engine())
    vocabulary = model.config.vocab_size
    return Served(name, engine, tokenizer, engine.max_len, vocabulary, options.max_running)


def _name(path: Path) -> str:
    return path.stem if path.is_file() else path.resolve().name


def random_model(seed: int = 0) -> Transformer:
    """Two layers that have learnt nothing: shows that everything runs, in a moment."""
    return Transformer(language_model(257, 64, 2, 4), seed=seed)


def byte_tokenizer() -> Tokenizer:
    """UTF-8 bytes as tokens, and one token that ends an answer."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Inner

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Inner(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<end>", special=True)])
    return Tokenizer(inner, ends=frozenset({len(alphabet)}), chat=ChatTemplate(PLAIN_CHAT))
