"""llama.cpp beside the engine, on the same weights without their quantisation: its own server as a process where
`llama-server` is installed, else its library under continuous batching, through llama-cpp-python."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch

from attlas.errors import UnsupportedError
from attlas.lab.serve_load import Asked

BATCH, PADDED = 2048, 256  # tokens of one call; lengths of sequences come in steps of this (llama.cpp's own defaults)
SECONDS_TO_START, SECONDS_TO_ANSWER = 60.0, 600.0


class Peer(Protocol):
    """name: what runs, on which weights."""

    name: str

    def answer(self, asked: Sequence[Asked]) -> list[list[int]]:
        """Greedy answers to requests that are all there at once; nothing is kept from the call before."""
        ...

    def close(self) -> None: ...


def expand(file: Path, target: Path, kind: str) -> Path:
    """The GGUF file again with its matrices as F16, BF16 or F32; vectors are F32. Needs the package gguf."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize, quantize

    reader, wide = GGUFReader(str(file)), GGMLQuantizationType[kind]
    writer = GGUFWriter(str(target), reader.fields["general.architecture"].contents())
    told = ("general.architecture", "general.file_type", "general.quantization_version")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in told:
            inner = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, quantize(values, wide), raw_dtype=wide)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def server() -> str | None:
    """llama.cpp's server on PATH or beside the interpreter."""
    beside = Path(sys.executable).with_name("llama-server")
    return shutil.which("llama-server") or (str(beside) if beside.is_file() else None)


class Files:
    """A GGUF file's weights as other types, in a temporary folder that goes with this object. Of several types the one with which
    llama.cpp is fastest here takes part."""

    def __init__(self, file: Path | None, kinds: Sequence[str]) -> None:
        found = file is not None and (server() is not None or importlib.util.find_spec("llama_cpp") is not None)
        self.kinds, self.file = tuple(kinds) if found else (), file
        self._folder: TemporaryDirectory[str] | None = None

    def of(self, kind: str) -> Path:
        assert self.file is not None
        self._folder = self._folder or TemporaryDirectory(prefix="attlas-")
        path = Path(self._folder.name) / f"{kind}.gguf"
        return path if path.exists() else expand(self.file, path, kind)

    @contextlib.contextmanager
    def peers(self, rows: int, tokens: int) -> Iterator[list[Peer]]:
        """The peer, warm, with room for `rows` sequences of `tokens` tokens; none where llama.cpp is not installed."""
        if len(self.kinds) > 1:
            self.kinds = (min(self.kinds, key=self._seconds),)
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(self._peer(kind, rows, tokens)) for kind in self.kinds]

    @contextlib.contextmanager
    def _peer(self, kind: str, rows: int, tokens: int) -> Iterator[Peer]:
        peer: Peer = (LlamaServer if server() else LlamaBatch)(self.of(kind), rows, tokens)
        try:
            peer.answer([Asked((5, 6, 7), 2)] * min(2, rows))
            yield peer
        finally:
            peer.close()

    def _seconds(self, kind: str) -> float:
        """The shortest time of a few requests."""
        with self._peer(kind, 4, 128) as peer:
            found = []
            for turn in range(3):
                start = time.perf_counter()
                peer.answer([Asked(tuple(range(5 + i, 69 + i)), 16) for i in range(turn, turn + 4)])
                found.append(time.perf_counter() - start)
        return min(found)


def padded(tokens: int) -> int:
    """Room that llama.cpp makes for a sequence of so many tokens."""
    return -(-tokens // PADDED) * PADDED


class LlamaServer:
    """`llama-server` with one slot for each row; prompts as token ids over HTTP, one connection for each request."""

    def __init__(self, file: Path, rows: int, tokens: int) -> None:
        self.name = f"llama.cpp's server, {file.stem}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = self._command(file, rows, tokens)
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._wait()

    def _command(self, file: Path, rows: int, tokens: int) -> list[str]:
        binary, threads = server(), torch.get_num_threads()
        assert binary is not None
        options = {
            "model": file,
            "parallel": rows,
            "ctx-size": rows * padded(tokens),
            "threads": threads,
            "threads-batch": threads,
            "host": "127.0.0.1",
            "port": self.port,
            "cache-ram": 0,  # nothing is kept from the call before
        }
        return [
            binary,
            *(word for name, value in options.items() for word in (f"--{name}", str(value))),
            "--cont-batching",
            "--offline",
        ]

    def _wait(self) -> None:
        until = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(OSError):
                if self._call("GET", "/health", None)[0] == 200:
                    return
            time.sleep(0.05)
        self.close()
        raise UnsupportedError(f"bench serve: {server()} does not start; take it off PATH to measure without it")

    def _call(self, verb: str, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS_TO_ANSWER)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request(verb, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def _one(self, asked: Asked) -> list[int]:
        fields = {"temperature": 0, "ignore_eos": True, "cache_prompt": False, "return_tokens": True}
        status, told = self._call("POST", "/completion", {"prompt": list(asked.prompt), "n_predict": asked.tokens, **fields})
        if status != 200 or len(told["tokens"]) != asked.tokens:
            raise UnsupportedError(f"bench serve: llama-server answers {status}: {str(told)[:200]}")
        return [int(token) for token in told["tokens"]]

    def answer(self, asked: Sequence[Asked]) -> list[list[int]]:
        with ThreadPoolExecutor(len(asked)) as pool:
            return list(pool.map(self._one, asked))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


class LlamaBatch:
    """llama.cpp's library fed like an engine: each call holds the next token of every running sequence, and prompts in what is
    left of BATCH tokens; the most likely token is chosen here."""

    def __init__(self, file: Path, rows: int, tokens: int) -> None:
        import llama_cpp

        self.name, self.rows, self.lib = f"llama.cpp, batched decoding, {file.stem}", rows, llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p())
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch = rows * padded(tokens), rows, BATCH
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, params) if self.model else None
        if self.context is None:
            raise UnsupportedError(f"bench serve: llama.cpp cannot load {file.name} for {rows} sequences of {tokens} tokens")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def answer(self, asked: Sequence[Asked]) -> list[list[int]]:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        found: list[list[int]] = [[] for _ in asked]
        waiting, read = deque(range(len(asked))), [0] * len(asked)  # read: tokens of the prompt that have been fed
        rows: dict[int, int] = {}  # request -> its sequence
        while waiting or rows:
            while waiting and len(rows) < self.rows:
                rows[waiting.popleft()] = min(set(range(self.rows)) - set(rows.values()))
            self.batch.n_tokens, sampled = 0, []
            for i in sorted(rows, key=lambda i: not found[i]):  # those that decode go first
                prompt = asked[i].prompt
                if found[i]:
                    self._feed(found[i][-1], len(prompt) + len(found[i]) - 1, rows[i], True)
                else:
                    end = min(len(prompt), read[i] + BATCH - self.batch.n_tokens)
                    for at in range(read[i], end):
                        self._feed(prompt[at], at, rows[i], at == len(prompt) - 1)
                    read[i] = end
                sampled += [i] if read[i] == len(prompt) else []
            for i, token in zip(sampled, self._decode(len(sampled)), strict=True):
                found[i].append(token)
                if len(found[i]) == asked[i].tokens:
                    self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.context), rows.pop(i), -1, -1)
        return found

    def _feed(self, token: int, position: int, row: int, wanted: bool) -> None:
        batch, at = self.batch, self.batch.n_tokens
        batch.token[at], batch.pos[at], batch.logits[at] = token, position, wanted
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
        batch.n_tokens += 1

    def _decode(self, wanted: int) -> list[int]:
        """Run the batch; the most likely token of each place that asked for one, in the order of the batch."""
        import numpy as np

        if code := self.lib.llama_decode(self.context, self.batch):
            raise UnsupportedError(f"bench serve: llama_decode says {code}")
        if not wanted:
            return []
        logits = np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), shape=(wanted, self.vocabulary))
        return [int(token) for token in logits.argmax(1)]

    def close(self) -> None:
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)
