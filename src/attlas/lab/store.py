"""Results on disk. Every file is replaced as a whole, so a crash or a power cut leaves the old or the new one, never half of one.

    plan.json     what was decided up front: budgets, sizes, the machine
    trials.jsonl  one line per finished trial, in the order in which they finished
A trial is known by its key, a hash of everything that decides its result. A trial whose key is stored is not run again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from attlas.errors import DataError

try:
    import fcntl
except ImportError:  # Windows: no advisory locks, and so no protection against two runs in one folder
    fcntl = None  # type: ignore[assignment]

PLAN, TRIALS = "plan.json", "trials.jsonl"
OUTPUTS = ("results.json", "results.csv", "report.html")


def key_of(settings: dict[str, Any]) -> str:
    """Hash of a trial's settings (plain data); the order of keys does not matter."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_atomic(path: Path, text: str) -> None:
    """Write beside `path`, flush to the disk, then take its place."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"key", "stage", "status"} <= record.keys() else None


class Store:
    """The folder of one comparison, held exclusively while it is open (use it in a `with`)."""

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self.folder, self.fresh = folder, fresh
        self.records: dict[str, dict[str, Any]] = {}
        self.unreadable = 0
        self._lock: IO[str] | None = None

    def __enter__(self) -> Store:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("a")
        except OSError as error:
            raise DataError(f"cannot write to the folder {self.folder}: {error.strerror or error}") from error
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._lock.close()
                raise DataError(f"another comparison is writing to {self.folder}; wait for it or choose another --name") from None
        if self.fresh:
            for name in (PLAN, TRIALS, *OUTPUTS):
                (self.folder / name).unlink(missing_ok=True)
        self._read()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._lock is not None:
            self._lock.close()  # the file stays: removing it could take it from under a process that waits for it

    def _read(self) -> None:
        path = self.folder / TRIALS
        if not path.exists():
            return
        for line in path.read_text(encoding="utf-8").splitlines():
            record = _record(line)
            if record is None:
                self.unreadable += 1  # edited by hand; that trial runs again
            else:
                self.records[record["key"]] = record

    def plan(self) -> dict[str, Any] | None:
        path = self.folder / PLAN
        if not path.exists():
            return None
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is not readable as JSON ({error}); --fresh starts over") from error
        if not isinstance(plan, dict):
            raise DataError(f"{path} does not hold a plan; --fresh starts over")
        return plan

    def save_plan(self, plan: dict[str, Any]) -> None:
        write_atomic(self.folder / PLAN, json.dumps(plan, indent=1) + "\n")

    def done(self, key: str) -> bool:
        """Whether this trial has an outcome that need not be tried again; one that failed is tried again."""
        return key in self.records and self.records[key]["status"] != "failed"

    def add(self, record: dict[str, Any]) -> None:
        """Store the outcome of one trial, at once."""
        record = {**record, "at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        self.records.pop(record["key"], None)
        self.records[record["key"]] = record
        lines = [json.dumps(r, separators=(",", ":"), allow_nan=False) for r in self.records.values()]
        write_atomic(self.folder / TRIALS, "\n".join(lines) + "\n")

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        write_atomic(path, text)
        return path
