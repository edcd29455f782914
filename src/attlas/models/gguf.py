"""Models in GGUF files (llama.cpp), dequantised on reading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "rope.freq_base": "rope_theta",
}

# Name in the file -> name in a transformers checkpoint; {i} is the layer, in the file blk.{i}.
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{i}.input_layernorm",
    "attn_q": "model.layers.{i}.self_attn.q_proj",
    "attn_k": "model.layers.{i}.self_attn.k_proj",
    "attn_v": "model.layers.{i}.self_attn.v_proj",
    "attn_q_norm": "model.layers.{i}.self_attn.q_norm",
    "attn_k_norm": "model.layers.{i}.self_attn.k_norm",
    "attn_output": "model.layers.{i}.self_attn.o_proj",
    "ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "ffn_up": "model.layers.{i}.mlp.up_proj",
    "ffn_down": "model.layers.{i}.mlp.down_proj",
    "ffn_gate_inp": "model.layers.{i}.block_sparse_moe.gate",
}
GEMMA_NAMES = NAMES | {
    "post_attention_norm": "model.layers.{i}.post_attention_layernorm",
    "ffn_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "post_ffw_norm": "model.layers.{i}.post_feedforward_layernorm",
}
# All experts of a layer in one tensor -> the name of one of them.
EXPERTS = {
    "ffn_gate_exps": "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight",
    "ffn_up_exps": "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight",
    "ffn_down_exps": "model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight",
}


@dataclass(frozen=True)
class Architecture:
    """What a file calls its model, as transformers has it.

    names        NAMES or a family's own
    interleaved  rows of the query and key maps are stored for interleaved rotary pairs
    offset       norms are stored as 1 + w
    local_base   rotary base of layers with a window, which the file leaves to the reader
    largest      layers of the one model of the family that scales scores by (dim / num_heads) ** -0.5 and not by
                 head_dim ** -0.5, which the file leaves to the reader; 0 = the file is for a family where none does
    """

    model_type: str
    names: Mapping[str, str]
    interleaved: bool = False
    offset: bool = False
    local_base: float | None = None
    largest: int = 0


ARCHITECTURES = {
    "llama": Architecture("llama", NAMES, interleaved=True),
    "qwen2": Architecture("qwen2", NAMES),
    "qwen3": Architecture("qwen3", NAMES),
    "gemma2": Architecture("gemma2", GEMMA_NAMES, offset=True, largest=46),
    "gemma3": Architecture("gemma3_text", GEMMA_NAMES, offset=True, largest=62, local_base=10000.0),
}


def from_gguf(path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Transformer:
    """The model in a GGUF file of a known architecture (see ARCHITECTURES; "llama" is Llama, SmolLM, TinyLlama, Mistral without
    window, and Mixtral), with its quantised tensors expanded to `dtype` (None = fp32), one at a time.

    llama.cpp stores the rows of Llama's query and key maps for interleaved rotary pairs; they are brought back to the half-split
    order. Needs the package gguf. Raises DataError for a file that does not fit, UnsupportedError for another architecture.
    """
    reader = open_gguf(Path(path))
    name = _value(reader, "general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedError(f"{path}: GGUF architecture {name!r} is not supported; known: {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    fields = _fields(reader, name, architecture)
    model_type = "mixtral" if fields.get("num_local_experts") else architecture.model_type
    tied = all(t.name != "output.weight" for t in reader.tensors)
    config = config_from_hf({**fields, "model_type": model_type, "tie_word_embeddings": tied}, tensors=len(reader.tensors))
    model = empty_model(config, dtype=dtype, device=device)
    loader = Loader(model, PRESETS[model_type])
    for key, tensor in _tensors(reader, config, architecture):
        loader.feed(key, tensor)
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
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError) as error:  # whatever it stumbles over
        raise DataError(f"{path} is not a GGUF file, or a damaged or incomplete one: {error}") from error


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    found = None if field is None else field.contents()
    return float(f"{found:.7g}") if isinstance(found, float) else found  # stored in fp32: 1e-6, not 9.99999997e-07


def _fields(reader: Any, name: str, architecture: Architecture) -> dict[str, Any]:
    """The fields of a transformers configuration, as far as they are known."""
    found = {theirs: _value(reader, f"{name}.{ours}") for ours, theirs in FIELDS.items()}
    if found["vocab_size"] is None:
        found["vocab_size"] = int(_tensor(reader, "token_embd.weight").shape[1])
    found["rope_scaling"] = _scaling(reader, name)
    found["rope_local_base_freq"] = architecture.local_base
    if architecture.largest and found["num_attention_heads"]:
        by_width = found["num_hidden_layers"] == architecture.largest or not found["head_dim"]
        found["query_pre_attn_scalar"] = found["hidden_size"] // found["num_attention_heads"] if by_width else found["head_dim"]
    return {k: v for k, v in found.items() if v is not None}


def _scaling(reader: Any, name: str) -> dict[str, Any] | None:
    """How rotary frequencies are stretched: by a rule, or each by a number of its own."""
    kind = _value(reader, f"{name}.rope.scaling.type")
    if any(t.name == "rope_freqs.weight" for t in reader.tensors):
        return {"rope_type": "each", "factors": tuple(_tensor(reader, "rope_freqs.weight").data.tolist())}
    if kind in (None, "none"):
        return None
    factor, original = (_value(reader, f"{name}.rope.scaling.{n}") for n in ("factor", "original_context_length"))
    return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}


def _tensor(reader: Any, name: str) -> Any:
    found = next((t for t in reader.tensors if t.name == name), None)
    if found is None:
        raise DataError(f"the GGUF file holds no {name}")
    return found


def _tensors(reader: Any, config: TransformerConfig, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the file under their names in a transformers checkpoint."""
    from gguf.quants import dequantize

    assert config.decoder is not None
    heads = {"attn_q": config.num_heads, "attn_k": config.decoder.mixers[0].given["num_kv_heads"]}
    for entry in reader.tensors:
        if entry.name == "rope_freqs.weight":
            continue
        # Copied, because the reader's arrays are windows on a file that is mapped read-only.
        tensor = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy())
        stem, _, kind = entry.name.rpartition(".")
        *block, part = stem.split(".")
        layer = block[-1] if block else ""
        if part in EXPERTS:
            for e, one in enumerate(tensor):
                yield EXPERTS[part].replace("{i}", layer).replace("{e}", str(e)), one
            continue
        if architecture.interleaved and part in heads:
            tensor = half_split_rows(tensor, heads[part])
        if architecture.offset and part.endswith("norm"):
            tensor = tensor - 1.0
        known = architecture.names.get(part)
        yield entry.name if known is None else f"{known.replace('{i}', layer)}.{kind}", tensor


def half_split_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from interleaved order (x0, y0, x1, y1, ...) to half-split order (x0, x1, ..., y0, y1, ...)."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
