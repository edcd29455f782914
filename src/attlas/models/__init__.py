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
from attlas.models.convert import ModelConversion, group_heads, to_latent_model
from attlas.models.generate import generate
from attlas.models.gguf import from_gguf
from attlas.models.layers import Memory
from attlas.models.load import load_model
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
    "ModelConversion",
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
    "group_heads",
    "language_model",
    "load_hf_state_dict",
    "load_model",
    "preset",
    "to_latent_model",
    "with_mixers",
]
