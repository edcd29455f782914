"""Models in GGUF files of every known architecture, against the transformers model that the file was written from. Names in the
files come from the package gguf, as in llama.cpp's converter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attlas.models.gguf import from_gguf
from attlas.models.load import load_model
from attlas.positions.scaling import Each
from gguf_files import finish, interleaved_rows, write_fields
from hf_models import GEMMA, LLAMA, randomise, tokens, transformers

CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # norms are rounded where 1 is added to them
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA_14 = {**GEMMA, "query_pre_attn_scalar": 14, "num_hidden_layers": 7}
# name -> (architecture in the file, configuration class, model class, fields)
FILES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaConfig", "LlamaForCausalLM", LLAMA),
    "llama 3": (
        "llama",
        "LlamaConfig",
        "LlamaForCausalLM",
        {**LLAMA, "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 19}},
    ),
    "mixtral": ("llama", "MixtralConfig", "MixtralForCausalLM", {**LLAMA, "num_local_experts": 5, "num_experts_per_tok": 3}),
    "qwen2": ("qwen2", "Qwen2Config", "Qwen2ForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", "Qwen3Config", "Qwen3ForCausalLM", {**LLAMA, "head_dim": 14}),
    "gemma2": (
        "gemma2",
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**GEMMA_14, "final_logit_softcapping": 13.0, "attn_logit_softcapping": 7.0},
    ),
    "gemma3": ("gemma3", "Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA_14),
}


def rope_freqs(config: Any) -> Tensor:
    """What the frequencies of Llama 3 are divided by."""
    p, dim = config.rope_parameters, config.hidden_size // config.num_attention_heads
    long, short = (p["original_max_position_embeddings"] / p[f"{n}_freq_factor"] for n in ("low", "high"))
    found = []
    for i in range(dim // 2):
        wave = 2 * math.pi * p["rope_theta"] ** (2 * i / dim)
        smooth = (p["original_max_position_embeddings"] / wave - p["low_freq_factor"]) / (
            p["high_freq_factor"] - p["low_freq_factor"]
        )
        between = 1 / ((1 - smooth) / p["factor"] + smooth)
        found.append(1.0 if wave < short else p["factor"] if wave > long else between)
    return torch.tensor(found)


def pieces(key: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """Experts as files have them: three tensors instead of two."""
    if key.endswith("experts.gate_up_proj"):
        gate, up = value.chunk(2, dim=1)
        stem = key.removesuffix("gate_up_proj").replace("mlp.", "block_sparse_moe.")
        return [(f"{stem}w1.weight", gate), (f"{stem}w3.weight", up)]
    if key.endswith("experts.down_proj"):
        return [(key.replace("mlp.", "block_sparse_moe.").replace("down_proj", "w2.weight"), value)]
    return [(key.replace("mlp.gate.", "block_sparse_moe.gate."), value)]


def write(path: Path, model: Any, architecture: str) -> Path:
    import gguf

    c = model.config
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, c.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    write_fields(writer, c)
    if c.rope_parameters.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_freqs(c).numpy())
    for key, whole in model.state_dict().items():
        if key == "lm_head.weight" and c.tie_word_embeddings:
            continue
        for name, value in pieces(key, whole):
            if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
                value = interleaved_rows(value, c.num_attention_heads if "q_proj" in name else c.num_key_value_heads)
            if architecture.startswith("gemma") and "norm" in name:
                value = value + 1
            short = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert short is not None, name
            writer.add_tensor(short, value.contiguous().numpy())
    finish(writer)
    return path


@pytest.mark.parametrize("name", FILES)
def test_logits(name: str, tmp_path: Path):
    architecture, config, cls, fields = FILES[name]
    t = transformers()
    made = getattr(t, config)(**fields)
    made._experts_implementation = "eager"
    model = randomise(getattr(t, cls)(made)).eval()
    got = load_model(write(tmp_path / "m.gguf", model, architecture))
    x = tokens(2, 31)
    with torch.no_grad():
        want = model(x).logits
        torch.testing.assert_close(got(x), want, **CLOSE)
    assert want.std() > 0.3 and got.config.max_positions == 83
    if name == "llama 3":
        factors = got.config.main.mixers[0].given["rope"].scaling
        assert isinstance(factors, Each) and len(set(factors.factors)) > 1


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_size_whose_scores_are_scaled_by_its_width(name: str, layers: int, tmp_path: Path):
    architecture, config, cls, fields = FILES[name]
    t = transformers()
    made = getattr(t, config)(**{**fields, "num_hidden_layers": layers, "layer_types": None, "query_pre_attn_scalar": 10})
    model = getattr(t, cls)(made)
    got = from_gguf(write(tmp_path / "m.gguf", model, architecture))
    assert got.config.main.mixers[0].given["scale"] == 10**-0.5
