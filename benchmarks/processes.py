"""What it costs to announce a step to followers: encoding, a TCP connection on this machine, decoding.

    python benchmarks/processes.py [--followers 1] [--steps 2000]

The followers are threads that receive as a process does and compute nothing. Prints microseconds a step (two messages,
of which one has the step's descriptor) in process 0: mean over the steps, the median of five runs.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import threading
import time

import numpy as np
from tokenloom.serve.channel import Wire
from tokenloom.serve.processes import Group


def connected() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection."""
    with socket.create_server(("localhost", 0)) as server:
        here = socket.create_connection(server.getsockname())
        return here, server.accept()[0]


def follow(group: Group) -> None:
    while group.next() is not None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--followers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--numbers", type=int, default=3 * 8 + 8 * 64, help="in a descriptor")
    arguments = parser.parse_args()
    pairs = [connected() for _ in range(arguments.followers)]
    count = arguments.followers + 1
    leader = Group(0, count, {index: Wire(here, 60) for index, (here, _) in enumerate(pairs, 1)}, 60)
    followers = [Group(index, count, {0: Wire(there, 60)}, 60) for index, (_, there) in enumerate(pairs, 1)]
    threads = [threading.Thread(target=follow, args=(group,)) for group in followers]
    for thread in threads:
        thread.start()
    packed, means = np.zeros(arguments.numbers, np.int32), []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(arguments.steps):
            leader.command(
                "step", {"shape": (8, 1, 0, 0), "draft": None, "between": True}, {"packed": packed}
            )
            leader.command("head")
        means.append((time.perf_counter() - start) / arguments.steps)
    leader.close()
    for thread in threads:
        thread.join()
    print(f"{statistics.median(means) * 1e6:.0f} microseconds a step, {arguments.followers} followers")


if __name__ == "__main__":
    main()
