"""Trainings side by side: worker processes of one thread each, so that small models use all cores.

Threads inside one small model mostly wait for each other; on a machine that does something else beside they can make it many
times slower. Processes do not wait, and a model trained on one thread gives the same numbers on any number of cores.

A worker is this Python with `serve` as its program; the two talk in pickles over the worker's stdin and stdout. A worker whose
parent is gone ends by itself, within a step. One that dies costs its trial, and another takes its place.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from attlas.registry import load_attr

# key -> function of a ticker (fraction, words) that runs the trial and returns its record.
Jobs = Mapping[str, Callable[[Callable[[float, str], None]], dict[str, Any]]]
PROGRAM = "from attlas.lab.pool import serve; serve()"
TICK_SECONDS = 0.2


@dataclass(frozen=True)
class Event:
    """kind: "begin", "tick", "done" or "lost" (the worker died; `words` say how)."""

    kind: str
    key: str
    fraction: float = 0.0
    words: str = ""
    record: dict[str, Any] | None = None


def serve() -> None:
    """The program of a worker: make the jobs, then run those that are asked for until the parent is gone."""
    inbox: IO[bytes] = sys.stdin.buffer
    outbox = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not end up between the messages
    import torch

    torch.set_num_threads(1)

    def send(message: tuple[Any, ...]) -> None:
        pickle.dump(message, outbox)
        outbox.flush()

    try:
        make, args = pickle.load(inbox)
        jobs: Jobs = load_attr(make)(*args)
        while True:
            key = pickle.load(inbox)
            send(("done", jobs[key](_ticker(send))))
    except (EOFError, BrokenPipeError):
        return


def _ticker(send: Callable[[tuple[Any, ...]], None]) -> Callable[[float, str], None]:
    last = [0.0]

    def tick(fraction: float, words: str = "") -> None:
        now = time.monotonic()
        if now - last[0] > TICK_SECONDS:
            last[0] = now
            send(("tick", fraction, words))

    return tick


class _Worker:
    """One process, and a thread that passes its messages on."""

    def __init__(self, number: int, make: str, args: tuple[Any, ...], events: queue.Queue[tuple[int, tuple[Any, ...]]]) -> None:
        self.number, self.key = number, ""
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        path = os.pathsep.join(p for p in sys.path if p)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the parent, which then ends the workers
        )
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()
        self.send((make, args))

    def send(self, message: object) -> None:
        assert self.process.stdin is not None
        try:
            pickle.dump(message, self.process.stdin)
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            pass  # it has died; the listener says so

    def _listen(self, events: queue.Queue[tuple[int, tuple[Any, ...]]]) -> None:
        assert self.process.stdout is not None
        try:
            while True:
                events.put((self.number, pickle.load(self.process.stdout)))
        except (EOFError, pickle.UnpicklingError, ValueError, OSError):
            events.put((self.number, ("lost",)))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                stream.close()

    def last_words(self) -> str:
        """Why it died, as far as it said."""
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        how = f"ended with code {code}" if code >= 0 else f"was killed by signal {-code}"
        return f"the worker process {how}{' (out of memory?)' if code == -9 else ''}" + (f": {lines[-1]}" if lines else "")


def run(keys: Sequence[str], workers: int, make: str, args: tuple[Any, ...]) -> Generator[Event, None, None]:
    """Run the jobs `keys` on so many processes and yield what happens, as it happens.

    make  "module:function" that a worker calls with args to get its Jobs; args must be picklable
    Closing the iterator, or an exception where it is used, ends the workers.
    """
    waiting = list(keys)
    events: queue.Queue[tuple[int, tuple[Any, ...]]] = queue.Queue()
    pool: dict[int, _Worker] = {}
    number = 0
    try:
        while waiting or any(w.key for w in pool.values()):
            while waiting and len(pool) < workers:
                pool[number] = _Worker(number, make, args, events)
                number += 1
            for worker in pool.values():
                if not worker.key and waiting:
                    worker.key = waiting.pop(0)
                    worker.send(worker.key)
                    yield Event("begin", worker.key)
            try:
                who, message = events.get(timeout=0.5)  # wakes up for Ctrl-C
            except queue.Empty:
                continue
            worker = pool[who]
            if worker.key:
                yield _event(worker, message)
            if message[0] == "lost":
                pool.pop(who).end()
            elif message[0] == "done":
                worker.key = ""
    finally:
        for worker in pool.values():
            worker.end()


def _event(worker: _Worker, message: tuple[Any, ...]) -> Event:
    kind, *rest = message
    if kind == "tick":
        return Event("tick", worker.key, fraction=rest[0], words=rest[1])
    if kind == "done":
        return Event("done", worker.key, record=rest[0])
    return Event("lost", worker.key, words=worker.last_words())
