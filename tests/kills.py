"""A batch job in a process of its own that is killed at drawn moments, for the test and the benchmark."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

from tokenloom.tests.tiny import LENGTH

SIZES = dict(max_num_seqs=2, max_num_batched_tokens=32, max_model_len=LENGTH)  # few programs: a quick start
CHILD = """
import sys
from tokenloom import LLM
from tokenloom.serve.batch import run_batch
llm = LLM(sys.argv[1], progress=False, **eval(sys.argv[4]))
run_batch(llm, sys.argv[2], sys.argv[3], flush_seconds=0.01)
"""


def write_input(path: Path, count: int, seed: int = 0) -> None:
    """Completions and chats, sampled, most without a seed; a few lines that are errors."""
    draw = random.Random(seed)
    lines = []
    for index in range(count):
        body: dict = {"max_tokens": draw.randint(4, 40), "n": draw.choice([1, 1, 1, 2]), "ignore_eos": True}
        if draw.random() < 0.1:
            body["seed"] = index
        url = draw.choice(["/v1/completions", "/v1/completions", "/v1/chat/completions"])
        if url == "/v1/completions":
            body["prompt"] = f"def f{index}("
        else:
            body["messages"] = [{"role": "user", "content": f"message {index}"}]
        if draw.random() < 0.05:
            body["temperature"] = -1
        lines.append(json.dumps({"custom_id": f"r{index}", "method": "POST", "url": url, "body": body}))
    path.write_text("\n".join(lines) + "\n")


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run_and_kill(folder: Path, source: Path, target: Path, lines: int, pause: float) -> int:
    """Start or go on with the job, wait until it has written `lines` lines and `pause` seconds more, kill it.

    Returns the number of lines in the output.
    """
    begun = count_lines(target)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(source), str(target), repr(SIZES)]
    )
    while child.poll() is None and count_lines(target) < begun + lines:
        time.sleep(0.002)
    time.sleep(pause)
    child.kill()
    child.wait()
    return count_lines(target)


def results(path: Path) -> dict[str, dict]:
    """custom_id -> record without its date; fails when a custom_id comes twice."""
    found: dict[str, dict] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        assert record["custom_id"] not in found, f"{record['custom_id']} was answered twice"
        record.get("response", {"body": {}})["body"].pop("created", None)
        found[record["custom_id"]] = record
    return found


def differing(a: dict[str, dict], b: dict[str, dict]) -> list[str]:
    """The custom_ids whose results differ; both hold the same custom_ids."""
    assert a.keys() == b.keys(), f"only in one: {sorted(a.keys() ^ b.keys())}"
    return [name for name in a if a[name] != b[name]]
