"""Very many short requests with cancellations, deadlines, page pressure and shared prefixes: nothing may grow.

    python benchmarks/soak.py [--requests 20000] [--shape hybrid] [--policy fair] [--seed 0]

Prints a line for each tenth, and fails when memory grows by more than 2 % from the first tenth to the end, or
anything is left over.
"""

from __future__ import annotations

import argparse
import sys

from tokenloom import LLM, Fair, PrefillFirst, Priority, SarathiServe, SplitFuse
from tokenloom.tests.shapes import ALL
from tokenloom.tests.soak import SIZES, Soak, soak

POLICIES = {
    "sarathi": SarathiServe, "split_fuse": SplitFuse, "prefill_first": PrefillFirst, "priority": Priority,
    "fair": Fair,
}  # fmt: skip
GROWTH = 0.02


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--shape", choices=sorted(ALL), default="hybrid")
    parser.add_argument("--policy", choices=sorted(POLICIES), default="fair")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    policy = POLICIES[arguments.policy]()
    with LLM.from_config(
        ALL[arguments.shape](), 0, strict=True, progress=False, policy=policy, **SIZES
    ) as llm:
        engine = llm.engine

        def report(found: Soak, seconds: float) -> None:
            mark = found.marks[-1]
            print(
                f"{found.requests} requests, {found.samples} samples, {found.tokens} tokens, {engine.steps} steps: "
                f"{mark.memory / 1e6:.1f} MB, {mark.objects} objects, {mark.arrays} arrays ({seconds:.1f} s)",
                flush=True,
            )

        found = soak(llm, arguments.requests, arguments.seed, report)
        growth = {name: found.growth(name) for name in ("memory", "objects", "arrays")}
        print(f"ended: {dict(found.reasons)}; {engine.scheduler.preemptions} preemptions, "
              f"{engine.pages.hit_tokens} of {engine.pages.lookup_tokens} prompt tokens hit, "
              f"{engine.programs.compilations.late} late compilations")  # fmt: skip
        print("growth from the first tenth: " + ", ".join(f"{k} {v:+.2%}" for k, v in growth.items()))
        complete = sum(found.reasons.values()) == found.samples
        sys.exit(not complete or max(growth.values()) > GROWTH or growth["arrays"] != 0)


if __name__ == "__main__":
    main()
