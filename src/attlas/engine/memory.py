"""What an engine sets up once: the cache in its size, and the runner that fits the model."""

from __future__ import annotations

from bisect import bisect_right

from torch import Tensor

from attlas.cache.layer import Cache
from attlas.cache.manager import CacheManager
from attlas.cache.part import PartSpec
from attlas.engine.fused import FusedRunner
from attlas.engine.options import EngineOptions
from attlas.engine.runner import OneByOne, Runner
from attlas.errors import OptionError, UnsupportedError
from attlas.models.transformer import Transformer
from attlas.nn.mixer import Mixer

DEFAULT_MAX_LEN = 4096
DEFAULT_CACHE_BYTES = 1 << 30


class Memory:
    """The paged cache of a model and the longest sequence that fits."""

    def __init__(self, model: Transformer, options: EngineOptions) -> None:
        if model.config.kind != "decoder" or model.head is None:
            raise UnsupportedError(
                f"Engine: it continues texts with a decoder that makes logits; this model is {model.config.kind!r}"
            )
        self.specs = _specs(model)
        weight = model.embed.tokens.weight
        longest = max_len(model)
        if options.max_len is not None and longest is not None and options.max_len > longest:
            raise OptionError(f"EngineOptions: max_len={options.max_len}, but the model takes at most {longest} tokens")
        self.max_len = options.max_len or longest or DEFAULT_MAX_LEN
        self._check(options)
        probe = self._manager(options, weight, rows=1, pages=0)
        pages = self._pages(options, probe)
        self.max_len = _capacity(probe, pages, self.max_len)
        self.manager = self._manager(options, weight, rows=options.max_running, pages=pages)
        for part in (part for cache in self.manager.caches for part in cache.parts):
            part.cascade = options.cascade
        self.runner = make_runner(model, self.manager.caches, options)

    def _manager(self, options: EngineOptions, like: Tensor, *, rows: int, pages: int) -> CacheManager:
        return CacheManager(
            self.specs,
            rows=rows,
            pages=pages,
            page_size=options.page_size,
            dtype=like.dtype,
            device=like.device,
            prefix_caching=options.prefix_caching,
            swap_bytes=options.swap_bytes,
            kv_dtype=options.kv_dtype,  # type: ignore[arg-type]
            rollback=options.speculative,
        )

    def _check(self, options: EngineOptions) -> None:
        if options.speculative:
            for i, specs in enumerate(self.specs):
                if any(spec.kind in ("state", "lookahead") or spec.group > 1 for spec in specs):
                    raise UnsupportedError(
                        f"EngineOptions: speculative={options.speculative} takes rejected tokens back out of the cache; layer "
                        f"{i} sums tokens up, which cannot be taken back"
                    )
        if options.preemption == "swap" and not options.swap_bytes:
            raise OptionError("EngineOptions: preemption='swap' needs swap_bytes, the memory for what is copied aside")

    def _pages(self, options: EngineOptions, probe: CacheManager) -> int:
        if options.pages is not None:
            return options.pages
        most = options.max_running * _pages_of_one(probe, self.max_len)
        if options.cache_bytes is None:
            # A length that was asked for gets its pages, whatever they take; of one that the model only allows, what fits.
            least = _pages_of_one(probe, options.max_len or min(self.max_len, DEFAULT_MAX_LEN))
            return min(most, max(least, DEFAULT_CACHE_BYTES // max(probe.page_bytes, 1)))
        if options.cache_bytes < probe.page_bytes:
            raise OptionError(
                f"EngineOptions: cache_bytes={options.cache_bytes} is less than one page of {probe.page_bytes} bytes"
            )
        return min(most, options.cache_bytes // max(probe.page_bytes, 1))


def _pages_of_one(probe: CacheManager, length: int) -> int:
    """Pages that a sequence of `length` tokens takes when nothing of it is dropped or shared."""
    admission = probe.admit([0])
    assert admission is not None
    needed = probe.pages_needed(admission.row, length)
    probe.release(admission.row, None)
    return needed


def _capacity(probe: CacheManager, pages: int, longest: int) -> int:
    """The longest sequence, up to `longest` tokens, that `pages` pages can hold alone."""
    length = bisect_right(range(1, longest + 1), pages, key=lambda n: _pages_of_one(probe, n))
    if not length:
        raise OptionError(f"EngineOptions: {pages} pages do not hold a single token; {_pages_of_one(probe, 1)} are needed")
    return length


def make_runner(model: Transformer, caches: list[Cache], options: EngineOptions) -> Runner:
    """The fastest runner that the model and the options allow."""
    if FusedRunner.unsupported(model) is None:
        fused = FusedRunner(model, caches, alone=options.batch_invariant)
        if fused.invariant or not options.batch_invariant:
            return fused
    return OneByOne(model, caches) if options.batch_invariant else Runner(model, caches)


def mixers_of(model: Transformer) -> list[Mixer]:
    assert model.decoder is not None
    return model.decoder.mixers()


def _specs(model: Transformer) -> list[tuple[PartSpec, ...]]:
    return [_specs_of(i, mixer) for i, mixer in enumerate(mixers_of(model))]


def _specs_of(layer: int, mixer: Mixer) -> tuple[PartSpec, ...]:
    if mixer.memory_use == "required":
        raise UnsupportedError(f"Engine: layer {layer}: {mixer}: it reads a memory, which a request does not bring")
    try:
        return mixer.cache_specs()
    except UnsupportedError as error:
        raise UnsupportedError(f"Engine: layer {layer}: {error}") from error


def max_len(model: Transformer) -> int | None:
    """The longest sequence that the model takes, None = it does not say."""
    limits = [n for n in (model.config.max_positions, *(m.max_len for m in mixers_of(model))) if n is not None]
    if model.embed.positions is not None:
        limits.append(model.embed.positions.num_embeddings - model.embed.offset)
    return min(limits, default=None)
