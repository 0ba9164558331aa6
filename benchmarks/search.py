"""What searches cost: tokens generated against a plain majority of n, and how often the answer is right.

    python benchmarks/search.py [--prompts 48] [--samples 16] [--temperature 0.8] [--seats 16]
    python benchmarks/search.py --beams 10 [--groups 5] [--diversity 0.5] [--prompts 48]

The embedded model completes `return` lines of jinja2, a package that it was not trained on, from the lines before
them; an answer is the rest of the line, and right when it is jinja2's own. Every search draws the same samples (the
same seeds), so the table repeats exactly on one machine; counts do not depend on its speed. All prompts run at once.

With --beams the searches are beam search and Diverse Beam Search, over 12 tokens of which the first line is the
answer: how often it is right, how often one of all beams is (oracle), how many different runs of n tokens the beams
of a prompt hold (distinct-n, a share of all), and the time of a step with the beams of one prompt, interleaved.
"""

from __future__ import annotations

import argparse
import random
import time
from functools import partial
from pathlib import Path

import jinja2
from common import interleaved, table
from tokenloom import LLM, SamplingParams
from tokenloom.serve.outputs import CompletionOutput
from tokenloom.serve.search.beam_search import BeamSearch
from tokenloom.serve.search.best_of_n import BestOfN
from tokenloom.serve.search.diverse_beam_search import DiverseBeamSearch
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


def distinct(texts: list[list[int]], n: int) -> float:
    """Different runs of n tokens in these texts, over all runs."""
    runs = [tuple(text[at : at + n]) for text in texts for at in range(len(text) - n + 1)]
    return len(set(runs)) / max(1, len(runs))


def seconds_a_step(llm: LLM, prompt: str, search: BeamSearch) -> float:
    """Of a search over 24 tokens, its prompt cached."""
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    start, steps = time.perf_counter(), llm.engine.steps
    search.generate(llm, prompt, params)
    return (time.perf_counter() - start) / (llm.engine.steps - steps)


def compare_beams(arguments: argparse.Namespace) -> None:
    prompts, answers = drawn(arguments.prompts)
    width, groups, diversity = arguments.beams, arguments.groups, arguments.diversity
    found: dict[str, BeamSearch] = {
        "beam search": BeamSearch(width),
        f"diverse, {groups} groups": DiverseBeamSearch(width, groups=groups, diversity=diversity),
        f"diverse, {width} groups": DiverseBeamSearch(width, groups=width, diversity=diversity),
    }
    llm = LLM("demo", max_num_seqs=width, max_model_len=1024, page_size=16, progress=False)
    rows = [(f"{len(prompts)} prompts, {width} beams", "right", "oracle", "distinct-1", "distinct-2", "distinct-4",
             "pages copied a step", "time of a step")]  # fmt: skip
    contenders = {name: partial(seconds_a_step, llm, prompts[0], search) for name, search in found.items()}
    spent = interleaved(contenders, rounds=arguments.rounds)
    for name, search in found.items():
        results = search.generate(llm, prompts, SamplingParams(max_tokens=12))
        lines = [[one.text.split("\n")[0].strip() for one in result.chosen] for result in results]
        texts = [[llm.tokenizer.encode(text, add_special_tokens=False) for text in some] for some in lines]
        right = sum(some[0] == answer for some, answer in zip(lines, answers)) / len(prompts)
        oracle = sum(answer in some for some, answer in zip(lines, answers)) / len(prompts)
        shares = [sum(distinct(some, n) for some in texts) / len(texts) for n in (1, 2, 4)]
        copied = sum(one.pages_copied for one in results) / sum(one.steps for one in results)
        rows.append((name, f"{right:.3f}", f"{oracle:.3f}", *(f"{share:.3f}" for share in shares), f"{copied:.2f}",
                     f"{1e3 * spent[name]:.2f} ms, {spent[name] / spent['beam search']:.3f}"))  # fmt: skip
        print(*rows[-1], sep="  ", flush=True)
    print(table(rows))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seats", type=int, default=16, help="samples that run at once")
    parser.add_argument("--beams", type=int, help="compare searches by so many beams instead")
    parser.add_argument("--groups", type=int, default=5)
    parser.add_argument("--diversity", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=10, help="rounds of the interleaved timing of beams")
    arguments = parser.parse_args()
    if arguments.beams:
        compare_beams(arguments)
        return
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
