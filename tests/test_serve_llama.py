"""llama.cpp beside the engine: weights in 16 bits, its server over HTTP, its library batch by batch. Stand-ins take its place."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

from attlas.errors import UnsupportedError
from attlas.lab import serve_llama
from attlas.lab.serve_llama import Files, LlamaBatch, LlamaServer, expand
from attlas.lab.serve_load import Asked
from gguf_files import finish


def test_weights_are_expanded_for_llama_cpp(tmp_path: Path):
    source = write_gguf(tmp_path / "small.gguf")
    want = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(source).tensors}
    for kind, exact in (("F32", 0.0), ("BF16", 2**-8), ("F16", 2**-11)):
        made = GGUFReader(expand(source, tmp_path / f"{kind}.gguf", kind))
        assert made.fields["llama.context_length"].contents() == 61 and made.fields["tokenizer.ggml.tokens"].contents() == [
            "a",
            "b",
        ]
        for tensor in made.tensors:
            assert tensor.tensor_type.name == (kind if tensor.data.ndim > 1 else "F32")
            got = dequantize(tensor.data, tensor.tensor_type)
            assert (
                got.shape == want[tensor.name].shape
                and abs(got - want[tensor.name]).max() <= exact * abs(want[tensor.name]).max()
            )


def write_gguf(path: Path) -> Path:
    """A quantised matrix, a vector, and a few facts."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(61)
    writer.add_token_list(["a", "b"])
    matrix = rng.standard_normal((3, 64), dtype=np.float32)
    writer.add_tensor("blk.0.attn_q.weight", quantize(matrix, GGMLQuantizationType.Q4_1), raw_dtype=GGMLQuantizationType.Q4_1)
    writer.add_tensor("output_norm.weight", rng.standard_normal(7, dtype=np.float32))
    finish(writer)
    return path


def test_the_server_of_llama_cpp_is_driven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stand-in with its interface: every request arrives once, as ids, and all of them at the same time."""
    binary = tmp_path / "llama-server"
    binary.write_text(SERVER.format(python=sys.executable))
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    asked = [Asked((5, 6, n), n) for n in (2, 3, 7)]
    with Files(tmp_path / "any.gguf", ()).peers(3, 20) as none:
        assert none == []
    made = LlamaServer(tmp_path / "F16.gguf", 3, 20)
    assert made.name == "llama.cpp's server, F16"
    try:
        assert made.answer(asked) == [[5, 6], [5, 6, 3], [5, 6, 7, 0, 0, 0, 0]]
    finally:
        made.close()
    assert made.process.poll() is not None
    binary.write_text("#!/bin/false")
    with pytest.raises(UnsupportedError, match="does not start"):
        LlamaServer(tmp_path / "F16.gguf", 3, 20)


SERVER = """#!{python}
import json, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert options["--parallel"] == "3" and options["--ctx-size"] == "768" and options["--model"].endswith("F16.gguf")
together = threading.Barrier(3)

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.say({{"status": "ok"}})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["ignore_eos"] and not asked["cache_prompt"] and asked["temperature"] == 0
        together.wait(30)
        self.say({{"tokens": (asked["prompt"] + [0] * 7)[: asked["n_predict"]]}})

    def say(self, what):
        body = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass

ThreadingHTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
"""


def test_the_library_of_llama_cpp_is_fed_like_an_engine(monkeypatch: pytest.MonkeyPatch):
    """With more requests than sequences and prompts longer than a call: each answer is that of the request alone."""
    monkeypatch.setattr(serve_llama, "BATCH", 7)
    peer, model = LlamaBatch.__new__(LlamaBatch), SumModel()
    peer.rows, peer.lib, peer.batch, peer.context = 2, model, model, None
    monkeypatch.setattr(peer, "_decode", model.decode, raising=False)
    asked = [Asked(tuple(range(3, 3 + n)), m) for n, m in ((11, 2), (3, 5), (17, 1), (1, 3))]
    assert peer.answer(asked) == [[sum(a.prompt) * 2**i % 97 for i in range(a.tokens)] for a in asked]
    assert max(model.sizes) == 7 and model.rows == {0, 1} and not model.texts


class SumModel:
    """A library and its batch: the next token is the sum of all tokens before it, modulo 97."""

    def __init__(self) -> None:
        self.token, self.pos, self.logits, self.n_seq_id = ([0] * 7 for _ in range(4))
        self.seq_id, self.n_tokens = [[0] for _ in range(7)], 0
        self.texts: dict[int, list[int]] = {}
        self.sizes: list[int] = []
        self.rows: set[int] = set()

    def llama_get_memory(self, _: object) -> None:
        return None

    def llama_memory_clear(self, *_: object) -> None:
        self.texts.clear()

    def llama_memory_seq_rm(self, _: object, row: int, first: int, last: int) -> None:
        assert (first, last) == (-1, -1)
        del self.texts[row]

    def decode(self, wanted: int) -> list[int]:
        told = []
        for i in range(self.n_tokens):
            text = self.texts.setdefault(self.seq_id[i][0], [])
            assert self.pos[i] == len(text) and self.n_seq_id[i] == 1, "a token at another place than the next"
            text.append(self.token[i])
            told += [sum(text) % 97] if self.logits[i] else []
        self.sizes.append(self.n_tokens)
        self.rows |= self.texts.keys()
        assert len(told) == wanted
        return told
