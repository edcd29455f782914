"""Model files that are damaged: a sentence, never a traceback, and nothing of them is served."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from attlas.engine.tokenizer_files import load_tokenizer
from attlas.errors import AttlasError, DataError, OptionError
from attlas.models.load import load_model
from attlas.models.presets import config_from_hf
from attlas.serve.load import byte_tokenizer
from gguf_files import finish

SIZES: dict[str, Any] = {"vocab_size": 257, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 3, "num_key_value_heads": 3}
CONFIG: dict[str, Any] = {**SIZES, **HEADS, "model_type": "llama", "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that loads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"})).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_json())
    assert load_model(folder).config.vocab_size == 257 and load_tokenizer(folder).vocab_size == 257
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def refused(path: Path, load: Callable[[Path], Any] = load_model) -> str:
    with pytest.raises(DataError) as caught:
        load(path)
    return str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(folder: Path, value: float):
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, file)
    assert "up_proj.weight holds NaN or infinity in float32" in refused(folder)


def test_weights_that_do_not_fit_into_the_dtype_are_refused(folder: Path):
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][2] = 1e30
    save_file(weights, file)
    assert load_model(folder).config.vocab_size == 257
    with pytest.raises(DataError, match=r"norm\.weight holds NaN or infinity in float16"):
        load_model(folder, dtype=torch.float16)


NAMES = ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "hidden_act", "architectures"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [-1, 1.5, "abc", [], {}, 10**12, True], ids=str)
def test_a_configuration_that_makes_no_sense_is_a_sentence(folder: Path, name: str, value: Any):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    try:
        load_model(folder)
    except AttlasError as error:
        assert str(error)
    else:
        assert (name, value) in [("architectures", []), ("architectures", {}), ("architectures", "abc")]


@pytest.mark.parametrize("model_type", ["qwen3", "deepseek_v3", "t5", "longformer", "led", "rwkv", "gpt2", "gptj"])
@pytest.mark.parametrize("layers", [10, 10**12])
def test_more_layers_than_tensors_are_refused_before_anything_is_built(model_type: str, layers: int):
    names = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")
    config = AutoConfig.for_model(model_type).to_dict() | dict.fromkeys(names, layers) | {"layer_types": None}
    config |= {"max_window_layers": 0, "use_sliding_window": True, "sliding_window": 7}
    with pytest.raises(DataError, match=f"_layers?={layers}, but the checkpoint holds 9 tensors"):
        config_from_hf(config, tensors=9)


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("config.json", b"\xff\xfe\x00", "not JSON"),
        ("config.json", b"{", "not JSON"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "not a safetensors file"),
        ("model.safetensors", struct.pack("<Q", 2**62) + b"{}", "not a safetensors file"),
        ("model.safetensors.index.json", b'{"weight_map": [1]}', "weight_map"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 5}}', "weight_map"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../b"}}', "outside its folder"),
    ],
)
def test_a_file_that_makes_no_sense_is_named(folder: Path, name: str, text: bytes, words: str):
    (folder / name).write_bytes(text)
    assert words in refused(folder) and name in refused(folder)


def test_a_file_in_place_of_a_folder_and_a_name_in_place_of_a_path(folder: Path):
    assert "give the folder" in refused(folder / "model.safetensors")
    assert "not downloaded" in refused(Path("owner/model")) and "not downloaded" not in refused(folder / "no")


# ---- GGUF


def write_gguf(path: Path, layers: int) -> None:
    """A model of so many layers by its fields, and one tensor."""
    writer = GGUFWriter(str(path), "llama")
    writer.add_head_count(3)
    for name, value in (("block_count", layers), ("context_length", 64), ("embedding_length", 24), ("feed_forward_length", 40)):
        writer.add_uint32(f"llama.{name}", value)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(59)])
    writer.add_tensor("token_embd.weight", np.zeros((59, 24), dtype=np.float32))
    finish(writer)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, 1)
    return path.read_bytes()


def test_a_gguf_file_of_more_layers_than_tensors(tmp_path: Path):
    write_gguf(tmp_path / "m.gguf", 2**32 - 1)
    assert "=4294967295, but the checkpoint holds 1 tensors" in refused(tmp_path / "m.gguf")


def test_a_gguf_file_that_is_cut_off_or_overwritten_is_a_sentence(gguf: bytes, tmp_path: Path):
    damaged = [b"", b"XXXX" + gguf[4:], gguf[:8] + struct.pack("<Q", 2**60) + gguf[16:], gguf[:300] + bytes(2000)]
    damaged += [gguf[:n] for n in range(0, len(gguf), 97)]
    draw = random.Random(3)
    for _ in range(150):
        flipped = bytearray(gguf)
        for _ in range(3):
            flipped[draw.randrange(4, 1500)] = draw.randrange(256)
        damaged.append(bytes(flipped))
    path = tmp_path / "damaged.gguf"
    for data in damaged:
        path.write_bytes(data)
        for load in (load_model, load_tokenizer):
            with pytest.raises(AttlasError):
                load(path)


# ---- what stands beside a tokenizer


def test_settings_beside_a_tokenizer_may_hold_anything(folder: Path):
    settings = folder / "tokenizer_config.json"
    for held in ({"bos_token": 5, "eos_token": [1]}, {"chat_template": 5}, {"chat_template": [1, {"name": "default"}]}):
        settings.write_text(json.dumps(held))
        assert load_tokenizer(folder).chat is None
    settings.write_bytes(b"\xff")
    assert "not JSON" in refused(folder, load_tokenizer)


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ ''.__class__.__mro__ }}", "{{ gone() }}"]
)
def test_a_template_that_fails_is_a_sentence(folder: Path, template: str):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(OptionError, match="the chat template cannot render"):
        load_tokenizer(folder).encode_chat([{"role": "user", "content": "x"}])


def test_a_template_may_ask_for_the_date(folder: Path):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ strftime_now('%Y') }}"}))
    tokenizer = load_tokenizer(folder)
    assert 2020 < int(tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "x"}]))) < 2200
