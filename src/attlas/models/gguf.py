"""Models in GGUF files (llama.cpp), dequantised on reading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attlas.errors import DataError, UnsupportedError
from attlas.models.config import TransformerConfig
from attlas.models.presets import PRESETS, config_from_hf
from attlas.models.transformer import Transformer
from attlas.models.weights import Loader, empty_model

# Field of the file -> field of a transformers configuration.
FIELDS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}

# Name in the file -> name in a transformers checkpoint; {i} is the layer.
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.{i}.attn_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "blk.{i}.attn_q.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "blk.{i}.attn_k.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "blk.{i}.attn_v.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "blk.{i}.attn_output.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "blk.{i}.ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "blk.{i}.ffn_gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "blk.{i}.ffn_up.weight": "model.layers.{i}.mlp.up_proj.weight",
    "blk.{i}.ffn_down.weight": "model.layers.{i}.mlp.down_proj.weight",
}


def from_gguf(path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Transformer:
    """The model in a GGUF file of architecture "llama" (Llama, SmolLM, TinyLlama, Mistral without window ...), with its quantised
    tensors expanded to `dtype` (None = fp32), one at a time.

    llama.cpp stores the rows of the query and key maps for interleaved rotary pairs; they are brought back to the half-split
    order. Needs the package gguf. Raises DataError for a file that does not fit, UnsupportedError for another architecture.
    """
    reader = open_gguf(Path(path))
    fields = _fields(reader)
    tied = all(t.name != "output.weight" for t in reader.tensors)
    config = config_from_hf({**fields, "model_type": "llama", "tie_word_embeddings": tied})
    model = empty_model(config, dtype=dtype, device=device)
    loader = Loader(model, PRESETS["llama"])
    for name, tensor in _tensors(reader, config):
        loader.feed(name, tensor)
    loader.finish()
    return model


def open_gguf(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UnsupportedError("reading GGUF files needs the package gguf: pip install attlas[weights]") from error
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    try:
        return GGUFReader(path)
    except ValueError as error:
        raise DataError(f"{path} is not a GGUF file: {error}") from error


def _fields(reader: Any) -> dict[str, Any]:
    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    architecture = value("general.architecture")
    if architecture != "llama":
        raise UnsupportedError(f"GGUF architecture {architecture!r} is not supported; known: llama")
    found = {theirs: value(f"llama.{ours}") for ours, theirs in FIELDS.items()}
    scaling = value("llama.rope.scaling.type")
    if scaling not in (None, "none"):
        factor = value("llama.rope.scaling.factor")
        original = value("llama.rope.scaling.original_context_length")
        found["rope_scaling"] = {"rope_type": scaling, "factor": factor, "original_max_position_embeddings": original}
    if found["vocab_size"] is None:
        table = next((t for t in reader.tensors if t.name == "token_embd.weight"), None)
        if table is None:
            raise DataError("the GGUF file holds no token_embd.weight")
        found["vocab_size"] = int(table.shape[1])
    return {k: v for k, v in found.items() if v is not None}


def _tensors(reader: Any, config: TransformerConfig) -> Iterator[tuple[str, Tensor]]:
    from gguf.quants import dequantize

    assert config.decoder is not None
    names = {
        ours.replace("{i}", str(i)): theirs.replace("{i}", str(i))
        for ours, theirs in NAMES.items()
        for i in range(config.decoder.num_layers)
    }
    heads = {"attn_q": config.num_heads, "attn_k": config.decoder.mixers[0].given["num_kv_heads"]}
    for entry in reader.tensors:
        if entry.name == "rope_freqs.weight":
            raise UnsupportedError(
                "the GGUF file stretches its rotary frequencies one by one (rope_freqs), which is not supported"
            )
        # Copied, because the reader's arrays are windows on a file that is mapped read-only.
        tensor = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy())
        part = entry.name.split(".")[-2]
        if part in heads:
            tensor = half_split_rows(tensor, heads[part])
        yield names.get(entry.name, entry.name), tensor


def half_split_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from interleaved order (x0, y0, x1, y1, ...) to half-split order (x0, x1, ..., y0, y1, ...)."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
