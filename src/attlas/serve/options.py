"""What a server is told when it starts."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from attlas.engine.options import EngineOptions, Preemption
from attlas.errors import OptionError
from attlas.registry import suggest

KV_DTYPES = ("int8", "fp8")
LEVELS = ("critical", "error", "warning", "info", "debug")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request, and all of them together, may take.

    queue          sequences that may wait beyond those that run; more are refused with 429
    body           bytes of a request's body
    body_seconds   within which a body must have arrived
    seconds        that a request may take from its arrival to its last token
    answers        n of one request
    prompts        prompts of one request
    stops          stop texts of one request, each at most `stop_length` characters long
    schema         characters of a JSON schema
    stall          seconds that an answer waits for a client that does not read it
    """

    queue: int = 256
    body: int = 2 * 1024 * 1024
    body_seconds: float = 30.0
    seconds: float = 600.0
    answers: int = 16
    prompts: int = 64
    stops: int = 16
    stop_length: int = 256
    schema: int = 64 * 1024
    stall: float = 60.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if not (value >= 0 if name == "queue" else value > 0):
                raise OptionError(f"Limits: {name}={value!r}; it must be {'at least' if name == 'queue' else 'above'} 0")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What is served, to whom, and how much of it at once.

    model               a folder with config.json, *.safetensors and tokenizer.json, or a .gguf file; default: random weights
    tokenizer           a tokenizer.json, where the model brings none
    name                what clients call the model; default: the name of its folder or file
    host                address to listen on; the default is reached from this machine alone
    port                port to listen on; 0 takes a free one
    api_key             a key that clients must send (Authorization: Bearer KEY); repeat it for several. Each key has a cache of
                        its own. Also read from ATTLAS_API_KEY, separated by commas, where other users cannot see it
    without_keys        serve other machines without keys
    allow_host          a name by which a server without keys on this machine may be called, beside localhost and addresses
    allow_origin        an origin whose pages may use the server from a browser, such as http://localhost:3000; * = any (CORS)
    dtype               dtype of the weights: float32, bfloat16, float16
    max_len             longest prompt and answer together, in tokens; default: as many as the model takes and the cache holds
    max_running         sequences that run at once
    max_batched_tokens  tokens of one forward
    max_queue           sequences that may wait; more are refused with 429
    cache_mib           memory for the cache in MiB; default: for max_running sequences of max_len tokens, at most 1024 unless
                        one sequence takes more
    kv_dtype            store the cache in 8 bits: int8 or fp8; default: as the model computes
    page_size           tokens of a page of the cache
    prefix_caching      share the cache between prompts that begin alike
    preemption          what happens to a running sequence when pages run out
    swap_mib            memory in MiB for pages that are copied aside, with preemption swap
    speculative         tokens drafted per step by looking the last tokens up in the text so far; 0 = off
    batch_invariant     an answer is bitwise the same in any company
    request_seconds     longest that a request may take
    drain_seconds       after SIGTERM: how long admitted requests may still take before they are cut off
    max_body_mib        largest body of a request in MiB
    max_answers         largest n of a request
    log_level           of the server's log: critical, error, warning, info, debug
    """

    model: Path | None = None
    tokenizer: Path | None = None
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: tuple[str, ...] = field(default=(), metadata={"whole": True})
    without_keys: bool = False
    allow_host: tuple[str, ...] = field(default=(), metadata={"whole": True})
    allow_origin: tuple[str, ...] = field(default=(), metadata={"whole": True})
    dtype: str = "float32"
    max_len: int | None = None
    max_running: int = 32
    max_batched_tokens: int = 1024
    max_queue: int = 256
    cache_mib: float | None = None
    kv_dtype: str | None = None
    page_size: int = 16
    prefix_caching: bool = True
    preemption: Preemption = "recompute"
    swap_mib: float = 1024.0
    speculative: int = 0
    batch_invariant: bool = False
    request_seconds: float = 600.0
    drain_seconds: float = 120.0
    max_body_mib: float = 2.0
    max_answers: int = 16
    log_level: str = "warning"

    def __post_init__(self) -> None:
        if any(not key.strip() for key in self.api_key):
            raise OptionError("--api-key: a key is empty")
        if not 0 <= self.port <= 65535:
            raise OptionError(f"--port {self.port}: a port is between 0 and 65535")
        if not self.drain_seconds >= 0:
            raise OptionError(f"--drain-seconds {self.drain_seconds}: it must not be negative")
        if self.log_level not in LEVELS:
            raise OptionError(f"--log-level {self.log_level}: {suggest(self.log_level, LEVELS)}")
        if self.kv_dtype not in (None, *KV_DTYPES):
            raise OptionError(f"--kv-dtype {self.kv_dtype}: {suggest(str(self.kv_dtype), KV_DTYPES)}")
        if wrong := [o for o in self.allow_origin if o != "*" and not re.fullmatch(r"https?://[^/\s]+", o)]:
            raise OptionError(f"--allow-origin {wrong[0]}: give scheme and host, such as http://localhost:3000, or *")
        for name in ("cache_mib", "swap_mib"):
            if not (getattr(self, name) is None or 0 < getattr(self, name) < 2**40):
                raise OptionError(f"--{name.replace('_', '-')} {getattr(self, name)}: it must be above 0")

    def check_reach(self, keys: tuple[str, ...]) -> None:
        """Refuse to offer other machines a server without keys, unless that was asked for."""
        if not keys and not self.without_keys and not is_loopback(self.host):
            raise OptionError(
                f"--host {self.host} can be reached from other machines and no key is set: "
                "give --api-key (or ATTLAS_API_KEY), or say --without-keys"
            )

    def hosts(self, keys: tuple[str, ...]) -> tuple[str, ...] | None:
        """Names by which the server may be called, None = any: with keys, and where other machines reach it anyway."""
        return None if keys or not is_loopback(self.host) else self.allow_host

    def engine(self) -> EngineOptions:
        return EngineOptions(
            max_running=self.max_running,
            max_batched_tokens=self.max_batched_tokens,
            cache_bytes=None if self.cache_mib is None else int(self.cache_mib * 2**20),
            page_size=self.page_size,
            max_len=self.max_len,
            prefix_caching=self.prefix_caching,
            preemption=self.preemption,
            swap_bytes=int(self.swap_mib * 2**20) if self.preemption == "swap" else 0,
            kv_dtype=self.kv_dtype,
            speculative=self.speculative,
            batch_invariant=self.batch_invariant,
        )

    def limits(self) -> Limits:
        return Limits(
            queue=self.max_queue,
            body=int(self.max_body_mib * 2**20),
            seconds=self.request_seconds,
            answers=self.max_answers,
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
