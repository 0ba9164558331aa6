"""Speculation on the embedded models: tokens a step, and what that is worth in time.

    python benchmarks/speculation.py [--part steps time load] [--allow-load]

steps: held-out files of the standard library (never trained on), greedy: how many tokens a verification emits. An edit
repeats a file with a few names changed, the text that CopySpec is for. Counts do not depend on the machine.
time: one sequence, the embedded target deepened with blocks that add nothing (their last projections are zero: the
same function at the cost of a larger model) until it costs about 20 times its draft. load: 1 to 32 sequences,
speculation on, off, and SmartSpec choosing; medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from common import quiet_arguments, still_quiet, table
from safetensors.numpy import load_file, save_file
from tokenloom import LLM, CopySpec, DraftModel, SamplingParams, SmartSpec, TokenRecycling
from tokenloom.adapt.data import collect, split, standard_library
from tokenloom.serve.drafters.controller import Always, Controller
from tokenloom.serve.drafters.draft import Drafter

DEMO = Path(__file__).resolve().parent.parent / "model" / "demo"
PROMPT, OUTPUT = 256, 128
DEEP, LOADED = 28, 10
"""Blocks that are added for one sequence, and, with many more programs, for up to 32."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)


def held_out(count: int) -> list[str]:
    """Beginnings of held-out files."""
    _, held = split(collect(standard_library()))
    texts = sorted(one.text for one in held if len(one.text) > 4000)
    return random.Random(0).sample(texts, min(count, len(texts)))


def prompts(llm: LLM, count: int) -> list[list[int]]:
    assert llm.tokenizer is not None
    return [llm.tokenizer.encode(text[1000:])[:PROMPT] for text in held_out(count)]


def copying(llm: LLM, count: int) -> list[int]:
    """Tokens a step of CopySpec on edits, a passage and then the same with one name changed. The edit is given, not
    generated: the law of the workload, not of a model that is too small to edit."""
    assert llm.tokenizer is not None
    emitted = []
    for text in held_out(count):
        passage = text[1000:2200]
        names = sorted(set(re.findall(r"[a-z_]{5,}", passage)))
        renamed = passage.replace(names[len(names) // 2], "renamed") if names else passage
        before, target = (llm.tokenizer.encode(part) for part in (passage + "\n# renamed:\n", renamed))
        emitted += copy_steps(before, target, CopySpec())
    return emitted


def copy_steps(before: list[int], target: list[int], settings: CopySpec) -> list[int]:
    """How many tokens each step emits while `target` is written behind `before`."""
    text, emitted, at = before + target[:1], [], 1
    while at < len(target):
        end, match = text[-settings.match :], settings.match
        starts = (s for s in range(len(text) - match) if text[s : s + match] == end)
        first = next(starts, None)
        draft = [] if first is None else text[first + match : first + match + settings.copy]
        right = 0
        while right < len(draft) and at + right < len(target) and draft[right] == target[at + right]:
            right += 1
        step = target[at : at + right + 1]
        emitted.append(len(step))
        text, at = text + step, at + len(step)
    return emitted


def steps(count: int) -> None:
    drafters: dict[str, Drafter] = {
        **{f"draft model, {k} drafted": DraftModel(tokens=k) for k in (2, 4, 8)},
        **{f"Token Recycling, {n} slots": TokenRecycling(nodes=n) for n in (16, 80)},
        "CopySpec": CopySpec(),
        "CopySpec, else draft model, 4": CopySpec(fallback=DraftModel(tokens=4)),
    }
    rows = [(f"{count} held-out files, greedy", "tokens a step", "at least 1, 2, 3 ... tokens, of all steps")]
    for name, drafter in drafters.items():
        llm = LLM("demo", max_num_seqs=4, max_model_len=1024, progress=False, drafter=drafter)
        texts = prompts(llm, 2 * count)
        llm.generate(texts[count:], GREEDY, use_tqdm=False)  # what is kept across requests warms up
        speculation = llm.engine.programs.speculation
        assert speculation is not None
        before = speculation.acceptance
        speculation.acceptance = type(before)()
        llm.generate(texts[:count], GREEDY, use_tqdm=False)
        seen = speculation.acceptance
        places = " ".join(f"{one / seen.rows:.2f}" for one in seen.emitted[:7])
        rows.append((name, f"{seen.tokens_per_step:.2f}", places))
        llm.close()
    llm = LLM("demo", max_num_seqs=4, max_model_len=1024, progress=False)
    emitted = copying(llm, count)
    rows.append(("CopySpec, edits as given", f"{sum(emitted) / len(emitted):.2f}", f"{len(emitted)} steps"))
    print(table(rows))


def deepened(extra: int) -> Path:
    """The embedded model with `extra` blocks more, whose output projections are zero."""
    folder = Path(tempfile.mkdtemp(prefix="tokenloom-deep-"))
    for file in DEMO.glob("*.json"):
        shutil.copy(file, folder)
    config = json.loads((DEMO / "config.json").read_text())
    tensors, layers = load_file(DEMO / "model.safetensors"), config["num_hidden_layers"]
    for index in range(extra):
        for name in [name for name in tensors if name.startswith("model.layers.0.")]:
            zero = name.endswith(("o_proj.weight", "down_proj.weight"))
            copy = tensors[name]
            tensors[name.replace(".0.", f".{layers + index}.", 1)] = np.zeros_like(copy) if zero else copy
    config["num_hidden_layers"] = layers + extra
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def seconds(llm: LLM, texts: list[list[int]]) -> float:
    """Seconds a generated token, the prompt's share included."""
    start = time.perf_counter()
    llm.generate(texts, GREEDY, use_tqdm=False)
    return (time.perf_counter() - start) / (len(texts) * OUTPUT)


def medians(
    contenders: dict[str, tuple[LLM, Controller | None]], texts: list[list[int]], rounds: int
) -> dict[str, float]:
    """Seconds a token of each engine, and its controller: interleaved rounds, the first of which does not count."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, (llm, controller) in contenders.items():
            if controller is not None:
                llm.engine.programs.speculation.controller = controller
            found[name].append(seconds(llm, texts))
    return {name: statistics.median(one[1:]) for name, one in found.items()}


def timed(rounds: int) -> None:
    folder = deepened(DEEP)
    sizes = dict(max_num_seqs=1, max_model_len=1024, progress=False, prefix_cache=False)
    plain = LLM(folder, **sizes)
    draft = LLM("demo-draft", **sizes)
    makers: dict[str, Drafter] = {
        "draft model, 4": DraftModel(tokens=4),
        "Token Recycling, 16 slots": TokenRecycling(nodes=16),
        "CopySpec, else draft model, 4": CopySpec(fallback=DraftModel(tokens=4)),
    }
    drafting = {name: (LLM(folder, drafter=one, **sizes), None) for name, one in makers.items()}
    contenders = {"plain": (plain, None)} | drafting
    texts = prompts(plain, 1)
    alone = medians({"draft": (draft, None)}, texts, 1)["draft"]
    found = medians(contenders, texts, rounds)
    print(f"the target costs {found['plain'] / alone:.1f} times its draft a token")
    rows = [("one sequence, greedy", "ms a token", "plain over it")]
    rows += [(name, f"{1e3 * one:.2f}", f"{found['plain'] / one:.2f}") for name, one in found.items()]
    print(table(rows))
    shutil.rmtree(folder)


def loads(rounds: int) -> None:
    folder = deepened(LOADED)
    sizes = dict(
        max_num_seqs=32, max_model_len=256, max_num_batched_tokens=64, progress=False, prefix_cache=False
    )
    smart = SmartSpec()
    drafting = LLM(folder, drafter=DraftModel(tokens=(2, 4)), controller=smart, **sizes)
    always = Always(max(drafting.engine.programs.speculation.shapes))
    contenders = {
        "off": (LLM(folder, **sizes), None), "on, 4": (drafting, always), "SmartSpec": (drafting, smart)
    }  # fmt: skip
    rows = [("sequences", *contenders, "SmartSpec over the better")]
    for count in (1, 2, 4, 8, 16, 32):
        texts = (prompts(drafting, 32) * 2)[:count]
        found = medians(contenders, [text[:64] for text in texts], rounds)
        better = min(found["off"], found["on, 4"])
        times = (f"{1e3 * one:.2f}" for one in found.values())
        rows.append((str(count), *times, f"{found['SmartSpec'] / better:.2f}"))
    print(table(rows))
    print(f"milliseconds a token; measured seconds a step: {len(smart.seconds)} programs")
    shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--part", nargs="+", choices=["steps", "time", "load"], default=["steps", "time", "load"]
    )
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = quiet_arguments(parser, loaded="the times below mean little")
    if "steps" in arguments.part:
        steps(arguments.prompts)
    if "time" in arguments.part:
        timed(arguments.rounds)
    if "load" in arguments.part:
        loads(arguments.rounds)
    still_quiet(arguments)


if __name__ == "__main__":
    main()
