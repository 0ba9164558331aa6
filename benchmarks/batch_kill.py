"""A batch job that is killed many times equals one that was not.

    python benchmarks/batch_kill.py [--kills 100] [--requests 1200] [--seed 0]

Each run is a process of its own, killed (SIGKILL) at a drawn moment: after a drawn number of further results plus a
few milliseconds, one time in five during its start. At the end every request must have its result exactly once, and
the results must be those of a job that ran through.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from itertools import pairwise
from pathlib import Path

from tokenloom.serve.batch import run_batch
from tokenloom.tests import tiny
from tokenloom.tests.kills import count_lines, differing, results, run_and_kill, write_input


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--requests", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, target, whole = folder / "in.jsonl", folder / "out.jsonl", folder / "whole.jsonl"
        write_input(source, arguments.requests, arguments.seed)
        model = tiny.save(folder / "model")
        print(run_batch(tiny.llm(), source, whole), flush=True)
        step = max(1, arguments.requests // arguments.kills)
        lengths = [0]
        for kill in range(arguments.kills):
            lines = 0 if draw.random() < 0.2 else draw.randint(1, 2 * step)
            pause = draw.uniform(0.0, 3.0) if lines == 0 else draw.uniform(0.0, 0.03)
            lengths.append(run_and_kill(model, source, target, lines, pause))
            assert lengths[-1] >= lengths[-2], "a result was lost"
            print(f"kill {kill + 1}: {lengths[-1]} of {arguments.requests} results", flush=True)
        early = sum(a == b for a, b in pairwise(lengths))
        while count_lines(target) < arguments.requests:
            run_and_kill(model, source, target, arguments.requests, 0.0)
        found, expected = results(target), results(whole)
        for record in [
            *found.values(),
            *expected.values(),
        ]:  # the model's name and the settings' digest differ
            record["response"]["body"] = {**record["response"]["body"], "id": "", "model": ""}
            record["id"] = record["response"]["request_id"] = ""
        parted = differing(found, expected)
        print(f"{arguments.kills} kills ({early} before a new result), {len(found)} results, once each; "
              f"{len(parted)} differ from the unkilled job's {parted}")  # fmt: skip


if __name__ == "__main__":
    main()
