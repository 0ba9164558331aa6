"""What searches cost: tokens generated against a plain majority of n, and how often the answer is right.

    python benchmarks/search.py [--prompts 48] [--samples 16] [--temperature 0.8] [--seats 16]

The embedded model completes `return` lines of jinja2, a package that it was not trained on, from the lines before
them; an answer is the rest of the line, and right when it is jinja2's own. Every search draws the same samples (the
same seeds), so the table repeats exactly on one machine; counts do not depend on its speed. All prompts run at once.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import jinja2
from common import table
from tokenloom import LLM, SamplingParams
from tokenloom.serve.outputs import CompletionOutput
from tokenloom.serve.search.best_of_n import BestOfN
from tokenloom.serve.search.first_finish import FirstFinish
from tokenloom.serve.search.majority_vote import MajorityVote
from tokenloom.serve.search.search import Search

CONTEXT = 12  # lines before an answer


def drawn(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Prompts that end in `return`, and the rests of their lines."""
    found = []
    for path in sorted(Path(jinja2.__file__).parent.glob("*.py")):
        lines = path.read_text().split("\n")
        for number, line in enumerate(lines):
            head, word, rest = line.partition("return ")
            if word and not head.strip() and rest.strip() and not rest.endswith(("(", "[", "{", ",")):
                before = lines[max(0, number - CONTEXT) : number]
                found.append(("\n".join([*before, head + "return"]), rest.strip()))
    picked = random.Random(seed).sample(found, count)
    return [prompt for prompt, _ in picked], [answer for _, answer in picked]


def line(completion: CompletionOutput) -> str | None:
    """The answer of a sample whose line is complete."""
    return completion.text.strip() or None if completion.finish_reason == "stop" else None


def searches(n: int) -> dict[str, Search]:
    return {
        "one sample": BestOfN(1),
        "majority": MajorityVote(n, answer=line, early_stop=False),
        "majority, stopped early": MajorityVote(n, answer=line),
        "best of n, mean": BestOfN(n, "mean"),
        "best of n, cumulative": BestOfN(n, "cumulative"),
        "first finish": FirstFinish(n, accept=lambda one: line(one) is not None),
        "first finish of 4": FirstFinish(min(n, 4), accept=lambda one: line(one) is not None),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seats", type=int, default=16, help="samples that run at once")
    arguments = parser.parse_args()
    prompts, answers = drawn(arguments.prompts)
    params = [
        SamplingParams(temperature=arguments.temperature, max_tokens=48, stop="\n", seed=seed)
        for seed in range(len(prompts))
    ]
    llm = LLM("demo", max_num_seqs=arguments.seats, max_model_len=1024, progress=False)
    rows = [(f"{len(prompts)} prompts, n={arguments.samples}", "tokens", "of majority", "cancelled", "dropped",
             "steps", "right")]  # fmt: skip
    whole = 0
    for name, search in searches(arguments.samples).items():
        steps = llm.engine.steps
        found = search.generate(llm, prompts, params)
        spent = sum(one.tokens_generated for one in found)
        whole = spent if name == "majority" else whole
        right = sum(one.best is not None and line(one.best) == answer for one, answer in zip(found, answers))
        rows.append((name, str(spent), f"{spent / whole:.3f}" if whole else "", str(sum(
            one.tokens_cancelled for one in found)), str(sum(one.tokens_dropped for one in found)),
            str(llm.engine.steps - steps), f"{right / len(prompts):.3f}"))  # fmt: skip
        print(*rows[-1], sep="  ", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
