"""The files of a batch job: its input lines, and the output that survives a kill at any moment.

The output holds one whole line a finished request. Beside it, OUTPUT.job keeps the settings that the results
depend on, so that a job is only ever continued with the settings that it began with.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

from .openai import Refusal, dumps, loads

MAX_LINE = 64 << 20  # bytes
MAX_CUSTOM_ID = 512  # characters
OWN_PREFIX = "tokenloom:line:"  # custom_ids of lines that bring no usable one
FLUSH_LINES = 64
KEYS = {"custom_id", "method", "url", "body"}


class BatchStopped(RuntimeError):
    """The job could not go on (disk full, output removed, engine failure); what was complete is kept."""


@dataclass(frozen=True)
class Line:
    """One input line. `error` says why it is no request; url and body are what it asks then as far as known."""

    number: int
    custom_id: str
    key: str
    url: str = ""
    body: Any = field(default=None, repr=False)
    error: Exception | None = None


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of each line that is not blank, read as a stream; a line longer than MAX_LINE comes
    cut to MAX_LINE + 1 bytes."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE + 1):
            number += 1
            rest = raw
            while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE + 1)
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if raw.strip():
                yield number, raw


def parse_line(number: int, raw: bytes, salt: bytes = b"") -> Line:
    """A line as a request, or with the error that it is answered with; never raises.

    `key` identifies the line's content (32 hexadecimal digits, salted with the job's settings).
    """
    key = blake2b(raw.strip(), digest_size=16, key=salt).hexdigest()
    own = f"{OWN_PREFIX}{number}"
    try:
        if len(raw) > MAX_LINE:
            raise Refusal(f"line {number} is longer than {MAX_LINE} bytes; shorten it", code="line_too_long")
        value = loads(raw)
        if not isinstance(value, dict):
            raise Refusal(f"line {number} must be a JSON object, but is {ascii(value)[:80]}")
        own = _custom_id(value, number)
        unknown = sorted(set(value) - KEYS)
        if unknown:
            raise Refusal(f"line {number}: key {unknown[0]!r} is not known; use {', '.join(sorted(KEYS))}")
        if value.get("method") != "POST":
            raise Refusal(
                f'line {number}: method must be "POST", but is {ascii(value.get("method"))[:80]}',
                param="method",
            )
        if not isinstance(value.get("url"), str):
            raise Refusal(
                f"line {number}: url must be text, but is {ascii(value.get('url'))[:80]}", param="url"
            )
        return Line(number, own, key, value["url"], value.get("body"))
    except Refusal as error:
        return Line(number, own, key, error=error)


def _custom_id(value: dict[str, Any], number: int) -> str:
    given = value.get("custom_id")
    if isinstance(given, str) and 0 < len(given) <= MAX_CUSTOM_ID and not given.startswith(OWN_PREFIX):
        broken = [character for character in given if "\ud800" <= character <= "\udfff"]
        if not broken:
            return given
    raise Refusal(
        f"line {number}: custom_id must be a text of 1 to {MAX_CUSTOM_ID} characters that does not begin "
        f"with {OWN_PREFIX!r}, but is {ascii(given)[:80]}", param="custom_id", code="invalid_custom_id",
    )  # fmt: skip


def digest(text: str, salt: str = "") -> int:
    """128 bits of a text, as a number: what the index of a million custom_ids holds."""
    return int.from_bytes(blake2b(f"{salt}:{text}".encode(), digest_size=16).digest(), "big")


class ResultFile:
    """The output: whole lines, appended and synced in groups. Use as a context manager.

    done: custom_id (as a `digest`) -> key of the line that was answered, for every result of earlier runs, of which
    `failed` are errors. A torn last line, left by a crash, is cut. `write` and `sync` stand in for os.write and
    os.fsync in tests.

    Raises ValueError when another process writes the file, when it holds something else than results, or when it
    was begun with other settings; BatchStopped when results cannot be written.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], *, flush_seconds: float = 0.5,
        write: Callable[[int, bytes], int] = os.write, sync: Callable[[int], None] = os.fsync,
    ):  # fmt: skip
        self.path, self.settings, self.failed = path, settings, 0
        self.side = path.with_name(path.name + ".job")
        self._write, self._sync, self._flush_seconds = write, sync, flush_seconds
        self._buffer: list[bytes] = []
        self._oldest = 0.0
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(f"cannot write the output {path}: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise ValueError(f"the output {path} is not a file; results are appended to a file")
            self._lock()
            self._check_settings()
            self.done: dict[int, str] = {}
            self.size = self._read_done()
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, record: dict[str, Any]) -> None:
        """Add a result; it is on disk after at most `flush_seconds`, if `flush_due` is called often."""
        self._oldest = self._oldest if self._buffer else time.monotonic()
        self._buffer.append(dumps(record) + b"\n")
        self.flush_due()

    def flush_due(self) -> None:
        """Write the buffered lines if they are many or old."""
        old = time.monotonic() - self._oldest >= self._flush_seconds
        if len(self._buffer) >= FLUSH_LINES or (self._buffer and old):
            self.flush()

    def flush(self) -> None:
        """Write all buffered lines at once and sync them."""
        data, self._buffer = b"".join(self._buffer), []
        try:
            self._write_whole(data)
            self._sync(self._fd)
        except OSError as error:
            raise BatchStopped(
                f"cannot write to {self.path}: {error.strerror or error}; the results before are kept: free "
                f"space and run the same command to go on"
            ) from error
        if not self._in_place():
            raise BatchStopped(self._rescue())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None or self._buffer:
                self.flush()
        finally:
            os.close(self._fd)

    # -- opening -------------------------------------------------------------------------------------------

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"another process is writing {self.path}; wait for it, or name another output"
            ) from error

    def _check_settings(self) -> None:
        """A new output gets its OUTPUT.job; an old one must have been begun with the same settings."""
        if os.fstat(self._fd).st_size == 0:
            try:
                self._write_side()
            except OSError as error:
                raise ValueError(f"cannot write {self.side} beside the output: {error.strerror}") from error
            return
        try:
            before = json.loads(self.side.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.path} holds something, but {self.side.name} beside it cannot be read, so its job cannot "
                f"go on; name another output, or remove this one"
            ) from error
        if before != self.settings:
            names = sorted(n for n in {*before, *self.settings} if before.get(n) != self.settings.get(n))
            changes = ", ".join(f"{n} {before.get(n)!r} -> {self.settings.get(n)!r}" for n in names)
            raise ValueError(
                f"{self.path} was begun with other settings ({changes}), and its results would not match; use "
                f"the same settings, or name another output"
            )

    def _write_side(self) -> None:
        """Atomically, and on disk before the first result is."""
        new = self.side.with_name(self.side.name + ".new")
        with new.open("wb") as file:
            file.write(json.dumps(self.settings, indent=1).encode())
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.side)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _read_done(self) -> int:
        """Fill `done`, cut what a crash left of the last line, and return the size in bytes that is kept."""
        kept, bad = 0, 0
        with open(self._fd, "rb", closefd=False) as file:
            for number, raw in enumerate(file, 1):
                if bad:
                    raise ValueError(
                        f"line {bad} of {self.path} is no result of a batch job; name another output, or repair it"
                    )
                found = _result_key(raw)
                if found is None:
                    bad = number
                    continue
                self.done[digest(found[0])] = found[1]
                self.failed += found[2]
                kept += len(raw)
        if bad:
            os.ftruncate(self._fd, kept)
        return kept

    # -- writing -------------------------------------------------------------------------------------------

    def _write_whole(self, data: bytes) -> None:
        """Append `data`; of what cannot be written, the whole lines that fit are kept."""
        written = 0
        try:
            while written < len(data):
                written += self._write(self._fd, data[written:])
        finally:
            kept = data.rfind(b"\n", 0, written) + 1
            if kept < written:
                os.ftruncate(self._fd, self.size + kept)
            self.size += kept

    def _in_place(self) -> bool:
        """Whether the path still leads to the file that we write."""
        try:
            there, ours = os.stat(self.path), os.fstat(self._fd)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    def _rescue(self) -> str:
        """The output is gone from its path: keep its results, and say where they are."""
        if os.fstat(self._fd).st_nlink:
            return f"{self.path} was moved while the job ran; move it back and run the same command to go on"
        saved = self.path.with_name(self.path.name + ".rescued") if self.path.exists() else self.path
        try:
            with saved.open("xb") as copy:
                at = 0
                while block := os.pread(self._fd, 1 << 20, at):
                    copy.write(block)
                    at += len(block)
                copy.flush()
                os.fsync(copy.fileno())
            self._write_side()
        except OSError as error:
            return f"{self.path} was removed while the job ran, and its results could not be saved: {error}"
        return (
            f"{self.path} was removed while the job ran; its results are saved in {saved}: "
            f"run the same command with that output to go on"
        )


def _result_key(raw: bytes) -> tuple[str, str, bool] | None:
    """(custom_id, line key, whether it is an error) of an output line; None when it is not a whole result."""
    if not raw.endswith(b"\n"):
        return None
    try:
        record = json.loads(raw)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    custom_id, name = record.get("custom_id"), record.get("id")
    if not isinstance(custom_id, str) or not isinstance(name, str):
        return None
    return custom_id, name.removeprefix("batch_req_"), record.get("error") is not None
