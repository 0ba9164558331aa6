"""Messages between the processes of one model: frames over TCP that only those who know a token may send.

A frame is a u32 length (little endian) and a payload: a u32 length, a JSON object, and the bytes of the arrays that
its key "arrays" lists as [name, dtype, shape]. Nothing that arrives is ever executed or unpickled. Both sides prove
that they know the token (HMAC-SHA256 over both sides' random numbers) before a frame is read; what follows is neither
signed nor encrypted, as all else between the hosts of one JAX program.
"""

from __future__ import annotations

import hmac
import json
import math
import secrets
import socket
import struct
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LENGTH = struct.Struct("<I")
NONCE, DIGEST = 32, 32
HANDSHAKE_SECONDS = 10.0


@dataclass(frozen=True)
class Message:
    """What one process tells another: its kind, JSON values, and arrays by name."""

    kind: str
    values: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def encode(self) -> bytes:
        """The payload of a frame. Arrays hold numbers or bools."""
        whole = {name: np.asarray(array, order="C") for name, array in self.arrays.items()}
        table = [(name, array.dtype.str, array.shape) for name, array in whole.items()]
        head = json.dumps({"kind": self.kind, "values": self.values, "arrays": table}).encode()
        return b"".join((LENGTH.pack(len(head)), head, *(array.tobytes() for array in whole.values())))

    @staticmethod
    def decode(payload: bytes) -> Message:
        """The message of a payload; ValueError for what `encode` does not write."""
        try:
            (size,) = LENGTH.unpack_from(payload)
            head, at, arrays = json.loads(payload[4 : 4 + size]), 4 + size, {}
            for name, kind, shape in head["arrays"]:
                dtype, count = np.dtype(kind), math.prod(shape)
                if dtype.kind not in "biuf":
                    raise ValueError(f"array {name!r} has the dtype {kind!r}, not numbers")
                arrays[name] = np.frombuffer(payload, dtype, count, at).reshape(shape)
                at += count * dtype.itemsize
            return Message(head["kind"], head["values"], arrays)
        except (struct.error, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"a message of {len(payload)} bytes cannot be read ({error}); start every process with the same "
                f"version of tokenloom"
            ) from error


class Wire:
    """One connection: any thread may send, one thread receives. `timeout`: seconds for a send, and of silence."""

    def __init__(self, connection: socket.socket, timeout: float):
        self._socket, self._sending = connection, threading.Lock()
        connection.settimeout(timeout)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, payload: bytes) -> None:
        """Send a frame; OSError (a TimeoutError, too) when the other side does not take it."""
        with self._sending:
            self._socket.sendall(LENGTH.pack(len(payload)) + payload)

    def receive(self) -> Message | None:
        """The next message; None when the other side has closed. TimeoutError after `timeout` seconds of silence."""
        head = self._exactly(LENGTH.size)
        payload = None if head is None else self._exactly(LENGTH.unpack(head)[0])
        return None if payload is None else Message.decode(payload)

    def _exactly(self, count: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < count:
            part = self._socket.recv(min(count - len(parts), 1 << 20))
            if not part:
                return None
            parts += part
        return bytes(parts)

    def finish(self) -> None:
        """Send no more: the other side reads what was sent, and then the end."""
        with self._sending, suppress(OSError):  # the other side may have been faster
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Give the connection up; for the thread that receives."""
        self._socket.close()


class Door:
    """Where process 0 waits for the others."""

    def __init__(self, host: str):
        """`host`: process 0's name for the others; a loopback name is listened to on this machine only."""
        if host in ("localhost", "127.0.0.1", "::1"):
            self._socket = socket.create_server((host, 0), family=_family(host))
        elif socket.has_dualstack_ipv6():
            self._socket = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            self._socket = socket.create_server(("", 0))
        self.port: int = self._socket.getsockname()[1]
        self.token = secrets.token_hex(32)

    def admit(self, seconds: float, timeout: float) -> tuple[int, Wire] | None:
        """The next process that proves itself, (its index, its connection); strangers are turned away. None: nobody
        came within `seconds`."""
        self._socket.settimeout(max(seconds, 0.001))
        try:
            connection, _ = self._socket.accept()
        except TimeoutError:
            return None
        try:
            connection.settimeout(min(HANDSHAKE_SECONDS, timeout))
            mine = secrets.token_bytes(NONCE)
            connection.sendall(mine)
            told = _read(connection, LENGTH.size + NONCE + DIGEST)
            index, theirs = told[: LENGTH.size], told[LENGTH.size : -DIGEST]
            if hmac.compare_digest(told[-DIGEST:], _proof(self.token, b"enter", index, mine, theirs)):
                connection.sendall(_proof(self.token, b"welcome", index, mine, theirs))
                return LENGTH.unpack(index)[0], Wire(connection, timeout)
        except OSError:
            pass
        connection.close()
        return None

    def close(self) -> None:
        self._socket.close()


def enter(host: str, port: int, token: str, index: int, timeout: float) -> Wire:
    """Process `index`'s connection to the door of process 0; OSError when there is none, or not the right one."""
    connection = socket.create_connection((host, port), timeout)
    try:
        theirs, mine, name = _read(connection, NONCE), secrets.token_bytes(NONCE), LENGTH.pack(index)
        connection.sendall(name + mine + _proof(token, b"enter", name, theirs, mine))
        expected = _proof(token, b"welcome", name, theirs, mine)
        if not hmac.compare_digest(_read(connection, DIGEST), expected):
            raise ConnectionError(f"{host}:{port} is not process 0 of this program")
    except BaseException:
        connection.close()
        raise
    return Wire(connection, timeout)


def _proof(token: str, side: bytes, *parts: bytes) -> bytes:
    return hmac.digest(token.encode(), b"|".join((side, *parts)), "sha256")


def _read(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        part = connection.recv(count - len(found))
        if not part:
            raise ConnectionError("the connection was closed during the handshake")
        found += part
    return found


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
