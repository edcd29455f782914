"""One transformer that a configuration turns into any architecture, presets for known ones, and weight loading."""

from attlas.models.config import (
    AlibiConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    HeadConfig,
    MixerConfig,
    NormConfig,
    RelativeBiasConfig,
    RouterConfig,
    StackConfig,
    TransformerConfig,
    language_model,
    with_mixers,
)
from attlas.models.generate import generate
from attlas.models.gguf import from_gguf
from attlas.models.layers import Memory
from attlas.models.presets import config_from_hf, preset
from attlas.models.transformer import Transformer
from attlas.models.weights import from_pretrained, load_hf_state_dict

__all__ = [
    "AlibiConfig",
    "EmbeddingConfig",
    "FeedForwardConfig",
    "HeadConfig",
    "Memory",
    "MixerConfig",
    "NormConfig",
    "RelativeBiasConfig",
    "RouterConfig",
    "StackConfig",
    "Transformer",
    "TransformerConfig",
    "config_from_hf",
    "from_gguf",
    "from_pretrained",
    "generate",
    "language_model",
    "load_hf_state_dict",
    "preset",
    "with_mixers",
]
