"""What tests that write GGUF files of models share."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def interleaved_rows(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from half-split order to interleaved order, as llama.cpp's converter stores Llama's."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write_fields(writer: Any, c: Any) -> None:
    """The fields of a transformers configuration."""
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    rope = c.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if getattr(c, "head_dim", None):
        writer.add_key_length(c.head_dim)
    if c.model_type.startswith("gemma"):
        writer.add_sliding_window(c.sliding_window)
    if c.model_type == "gemma2":
        writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
        writer.add_final_logit_softcapping(c.final_logit_softcapping)
    if c.model_type == "mixtral":
        writer.add_expert_count(c.num_local_experts)
        writer.add_expert_used_count(c.num_experts_per_tok)


def finish(writer: Any) -> None:
    """Write all that the writer was given, tensors and fields."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
