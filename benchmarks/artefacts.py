"""From the start of a process to its first token: compiling, and starting on compiled programs.

    python benchmarks/artefacts.py [--model demo] [--repeats 3] [--max-num-seqs 1] [--max-num-batched-tokens 256]

Every start is a process of its own with an empty compilation cache. Both kinds alternate, and the medians' ratio is
printed, with the compilations that JAX announced in each process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT = "Once upon a time"


def child(arguments: argparse.Namespace) -> None:
    """Start, make one token, and print what that took as JSON: seconds since the parent started the process."""
    import jax

    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(str(kwargs.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    from tokenloom import LLM, SamplingParams

    imported = time.time() - arguments.started
    llm = LLM(
        arguments.model, max_num_seqs=arguments.max_num_seqs, progress=False, strict=True,
        max_num_batched_tokens=arguments.max_num_batched_tokens, compiled=arguments.compiled,
    )  # fmt: skip
    opened = time.time() - arguments.started
    output = llm.generate(PROMPT, SamplingParams(max_tokens=1, temperature=0.0))[0]
    first = time.time() - arguments.started
    print(
        json.dumps(
            {
                "imported": imported, "opened": opened, "first": first, "compilations": len(compiled),
                "token": list(output.outputs[0].token_ids),
            }
        )
    )  # fmt: skip


def start(arguments: argparse.Namespace, folder: Path | None) -> dict:
    """What a fresh process says, with an empty compilation cache."""
    sizes = [
        "--max-num-seqs",
        arguments.max_num_seqs,
        "--max-num-batched-tokens",
        arguments.max_num_batched_tokens,
    ]
    with tempfile.TemporaryDirectory() as cache:
        command = [
            sys.executable,
            __file__,
            "--model",
            arguments.model,
            *map(str, sizes),
            "--started",
            repr(time.time()),
        ]
        if folder is not None:
            command += ["--compiled", str(folder)]
        done = subprocess.run(command, env=clean(cache), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def clean(cache: str) -> dict[str, str]:
    """This process's environment with another compilation cache."""
    kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    return kept | {"XDG_CACHE_HOME": cache}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-num-seqs", type=int, default=1)
    parser.add_argument("--max-num-batched-tokens", type=int, default=256)
    parser.add_argument("--compiled", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.started is not None:
        child(arguments)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "compiled"
        before = time.time()
        subprocess.run(
            [
                sys.executable, "-m", "tokenloom.serve.cli", "compile", arguments.model, "-o", str(folder),
                "--max-num-seqs", str(arguments.max_num_seqs),
                "--max-num-batched-tokens", str(arguments.max_num_batched_tokens),
            ],
            env=clean(place), check=True, capture_output=True,
        )  # fmt: skip
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(
            f"written in {time.time() - before:.1f} s: {len(list(folder.iterdir())) - 1} programs, {size / 1e6:.1f} MB"
        )
        found: dict[str, list[dict]] = {"cold": [], "compiled": []}
        for _ in range(arguments.repeats):
            for name, source in (("cold", None), ("compiled", folder)):
                found[name].append(start(arguments, source))
                print(name, json.dumps(found[name][-1]), flush=True)
    report(found)


def report(found: dict[str, list[dict]]) -> None:
    medians = {
        name: {part: statistics.median(one[part] for one in runs) for part in ("imported", "opened", "first")}
        for name, runs in found.items()
    }
    for name, runs in found.items():
        parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in medians[name].items())
        print(f"{name}: {parts}; compilations {[one['compilations'] for one in runs]}")
    print(f"same first token: {len({tuple(one['token']) for runs in found.values() for one in runs}) == 1}")
    print(f"to the first token: {medians['cold']['first'] / medians['compiled']['first']:.1f} times as fast")


if __name__ == "__main__":
    main()
