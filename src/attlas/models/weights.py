"""Weights of other libraries into a `Transformer`: state dictionaries and local folders of safetensors files. Nothing is
unpickled."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attlas.errors import DataError, UnsupportedError
from attlas.models.config import TransformerConfig
from attlas.models.hf_fields import Fields
from attlas.models.presets import Preset, config_from_hf
from attlas.models.presets import preset as preset_of
from attlas.models.transformer import Transformer
from attlas.models.weight_maps import Weight, expand

SHOWN = 12
T = TypeVar("T")


def load_hf_state_dict(model: Transformer, state_dict: Mapping[str, Tensor], preset: Preset | str) -> Transformer:
    """Copy the weights of a transformers model into `model`, whose configuration `config_from_hf` made; returns `model`.

    preset  a Preset, or the `model_type` of one
    Every parameter must be found and every tensor used (beyond those that the preset knows to be no weights); tensors given
    twice, such as a tied output matrix, must be equal. Otherwise DataError, listing the names. Values are cast to the parameters'
    dtype.
    """
    loader = Loader(model, preset_of(preset) if isinstance(preset, str) else preset)
    for name, tensor in state_dict.items():
        loader.feed(name, tensor)
    loader.finish()
    return model


def from_pretrained(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    head: bool | None = None,
    max_len: int | None = None,
) -> Transformer:
    """The model in a local folder as transformers saves it: config.json and model.safetensors, or shards with their index.

    dtype    of the parameters; None = fp32
    head     whether the model makes logits; None = as the `architectures` field says (LlamaModel and its like have none)
    max_len  see `config_from_hf`
    Tensors are read one at a time. Needs the package safetensors. Raises DataError for missing files and for missing, unexpected
    or misshapen weights, UnsupportedError for an architecture without a preset.
    """
    folder = Path(folder)
    raw = _read_json(folder / "config.json")
    if raw.get("quantization_config"):
        raise UnsupportedError(f"{folder}: config.json has a quantization_config; give a folder of plain weights")
    preset = preset_of(Fields(raw).need("model_type"))
    files = _safetensors_files(folder)
    config = config_from_hf(raw, max_len=max_len, tensors=sum(1 for _ in _names(files)))
    names = raw.get("architectures") or []
    if head is False or (head is None and any(n.endswith("Model") and "Head" not in n for n in names)):
        config = replace(config, head=None)
    model = empty_model(config, dtype=dtype, device=device)
    loader = Loader(model, preset)
    for name, tensor in _read_safetensors(files):
        loader.feed(name, tensor)
    loader.finish()
    return model


def empty_model(
    config: TransformerConfig, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Transformer:
    """A model whose weights are about to be overwritten: no random numbers are drawn for them."""
    with _NoRandomNumbers():
        return Transformer(config, dtype=dtype, device=device)


class Loader:
    """Feeds the tensors of a checkpoint to a model, one after the other, and accounts for every name on both sides."""

    def __init__(self, model: Transformer, preset: Preset) -> None:
        self.preset, self.config = preset, model.config
        kept = model.state_dict().keys()  # buffers that are no part of it are made, not trained
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
        self.targets: dict[str, Tensor] = {**dict(model.named_parameters()), **buffers}
        depth = max(s.num_layers for s in (model.config.decoder, model.config.encoder) if s is not None)
        ffn = model.config.main.feed_forward
        self.rules = expand(preset.weights(model.config), depth, 0 if ffn is None else ffn.experts)
        self.filled: set[str] = set()
        self.unexpected: list[str] = []

    def feed(self, name: str, tensor: Tensor) -> None:
        """Copy one tensor to where it belongs."""
        rule = self.rules.get(name) or self.rules.get(name.removeprefix(self.preset.prefix))
        if rule is not None and all(self._slot(t) is not None for t in rule.targets):
            self._copy(rule, tensor)
        elif rule is None and any(fnmatch(name, p) for p in self.preset.ignored):
            return
        elif self.config.head is not None or not self._belongs_to_head(name):
            self.unexpected.append(name)

    def _belongs_to_head(self, name: str) -> bool:
        """A headless model leaves the head of a checkpoint unread."""
        return bool(re.match(r"(lm_head|embed_out|head|cls\.predictions)\.|final_logits_bias$", name))

    def _slot(self, target: str) -> Tensor | None:
        found = re.fullmatch(r"(.*)\[(\d+)\]", target)
        if found is None:
            return self.targets.get(target)
        stacked = self.targets.get(found[1])
        return None if stacked is None else stacked[int(found[2])]

    @torch.no_grad()
    def _copy(self, rule: Weight, tensor: Tensor) -> None:
        parts = rule.convert(tensor)
        for target, part in zip(rule.targets, parts, strict=True):
            slot = self._slot(target)
            assert slot is not None
            if slot.shape != part.shape:
                raise DataError(f"{rule.source} {list(tensor.shape)} does not fit {target} {list(slot.shape)}")
            if target in self.filled:
                if not torch.equal(slot, part.to(slot)):
                    raise DataError(
                        f"{rule.source} differs from the tensor that was read before for {target}, which it is tied to"
                    )
                continue
            slot.copy_(part)
            if slot.numel() and not all(end.isfinite() for end in slot.aminmax()):
                raise DataError(f"{rule.source} holds NaN or infinity in {str(slot.dtype).removeprefix('torch.')}")
            self.filled.add(target)

    def finish(self) -> None:
        """Raise DataError unless every parameter was filled and every tensor was used."""
        missing = [t for name, p in self.targets.items() for t in self._pieces(name, p) if t not in self.filled]
        problems = []
        if missing:
            problems.append(f"{len(missing)} missing weights: {_some(missing)}")
        if self.unexpected:
            problems.append(f"{len(self.unexpected)} unexpected tensors: {_some(self.unexpected)}")
        if problems:
            raise DataError(f"the checkpoint does not match a {self.preset.model_type} model; " + "; ".join(problems))

    def _pieces(self, name: str, parameter: Tensor) -> list[str]:
        """The target itself, or its slices when it was filled slice by slice."""
        if f"{name}[0]" not in self.filled:
            return [name]
        return [f"{name}[{e}]" for e in range(parameter.shape[0])]


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f", ... and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


class _NoRandomNumbers(TorchFunctionMode):
    """Makes the random fills that layers do when they are built do nothing."""

    FILLS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.FILLS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{path} does not exist; give a folder that holds config.json and safetensors files") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON in UTF-8: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} must hold a JSON object")
    return found


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index).get("weight_map", {})
        if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
            raise DataError(f"{index} must say in weight_map which file holds each tensor")
        names = sorted(set(weight_map.values()))
        if any(Path(n).name != n for n in names):
            raise DataError(f"{index} names files outside its folder: {names}")
    else:
        names = ["model.safetensors"]
    files = [folder / n for n in names]
    if gone := [f.name for f in files if not f.exists()]:
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        hint = (
            f" ({', '.join(pickled)} would have to be unpickled, which is never done; convert it to safetensors)"
            if pickled
            else ""
        )
        raise DataError(f"{folder}: {', '.join(gone)} is missing{hint}")
    return files


def _names(files: Iterable[Path]) -> Iterator[str]:
    """Read from the heads of the files alone."""
    return _of_each_tensor(files, lambda _, name: name)


def _read_safetensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    return _of_each_tensor(files, lambda file, name: (name, file.get_tensor(name)))


def _of_each_tensor(files: Iterable[Path], take: Callable[[Any, str], T]) -> Iterator[T]:
    """take(open file, name) of all tensors, one at a time."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UnsupportedError("reading safetensors files needs the package safetensors: pip install attlas[weights]") from error
    try:
        for path in files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    yield take(file, name)
    except SafetensorError as error:
        raise DataError(f"{path} is not a safetensors file: {error}") from error
