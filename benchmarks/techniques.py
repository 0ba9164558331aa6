"""Every technique that changes how tokens are generated, side by side: what it saves, what it costs, how long it takes.

    python benchmarks/techniques.py [--parts quality times] [--only StreamingLLM Int8 ...] [--write] [--pictures FOLDER]

quality, on the embedded model: tokens a step (greedy, held-out code, after as much other code), bytes of keys and
values and of weights, and bits a byte of held-out text of --context tokens that is read token by token through the
technique (its second half is scored). These figures repeat; --pictures draws them.

times, of a generated token beside plain decoding, the least of --rounds, plain and technique in turn, over one
sequence: on the embedded model, and on bare 125M shapes with random weights, where drafts are hardly ever accepted, so
that is what a technique costs by itself. Only on a quiet machine.

`--write` puts each part's table into docs/techniques.md, between its marks. Techniques that need their own models or
workloads (DEL, MInference, schedulers, searches) have benchmarks of their own.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from caches import FOLDER, Reader, blocks
from common import checkpoint, interleaved, quiet_arguments, still_quiet, table
from speculation import held_out
from tokenizers import Tokenizer
from tokenloom import (
    CATS,
    GEAR,
    H2O,
    LLM,
    RSDC,
    RSDS,
    CopySpec,
    DoubleSparsity,
    DraftModel,
    Fp8,
    Int4,
    Int4KV,
    Int8,
    SamplingParams,
    SkipDecode,
    SpecTr,
    StreamingLLM,
    TidalDecode,
    TokenRecycling,
    UnifiedLayerSkipping,
)  # fmt: skip
from tokenloom.adapt import data

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "techniques.md"
PROMPT, OUTPUT = 192, 96
GREEDY = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)


@dataclass(frozen=True)
class Technique:
    """options of `LLM`; calibrated: some of them look at texts; bare: also on bare shapes."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    sampling: SamplingParams = GREEDY
    calibrated: bool = False
    bare: bool = True


PLAIN = Technique("plain")


def techniques(context: int) -> Iterator[Technique]:
    """What is compared: a fifth of the context, a sixteenth of the tokens, half of the layers' work."""
    fifth, sixteenth = context // 5, context // 16
    yield Technique("int8 keys and values", {"kv_cache_dtype": "int8"})
    yield Technique("StreamingLLM 20 %", {"cache": StreamingLLM(4, fifth - 4)})
    yield Technique("H2O 20 %", {"cache": H2O(fifth // 2, fifth - fifth // 2)})
    yield Technique("Double Sparsity 1/16, 8 channels", {"cache": DoubleSparsity(sixteenth, 8)})
    yield Technique("TidalDecode 1/16", {"cache": TidalDecode(sixteenth, (1, 3))})
    yield Technique("Int4KV", {"cache": Int4KV()})
    yield Technique("GEAR 4 bit", {"cache": GEAR()})
    yield Technique("Int8 weights", {"transforms": [Int8()]})
    yield Technique("Fp8 weights", {"transforms": [Fp8()]})
    yield Technique("Int4 weights, groups of 64", {"transforms": [Int4(group_size=64)]})
    yield Technique("CATS 50 %", {"transforms": [CATS(0.5)]}, calibrated=True)
    yield Technique("Unified Layer Skipping, half", {"transforms": [UnifiedLayerSkipping(2)]})
    yield Technique("SkipDecode to half", {"transforms": [SkipDecode(3, horizon=context)]})
    yield Technique("draft model, 4", {"drafter": DraftModel(tokens=4)}, bare=False)
    yield Technique("SpecTr, 2 lines of 4", {"drafter": SpecTr(drafts=2, tokens=4)}, bare=False)
    yield Technique("RSD-C (2,2,1)", {"drafter": RSDC(branching=(2, 2, 1))}, bare=False)
    yield Technique("RSD-S, 3 wide, 3 deep", {"drafter": RSDS(width=3, depth=3)}, bare=False)
    yield Technique("Token Recycling, 16 slots", {"drafter": TokenRecycling(nodes=16)})
    yield Technique("CopySpec", {"drafter": CopySpec()})
    steered = replace(GREEDY, temperature=1.0, seed=0, mirostat_mode=2, mirostat_tau=4.0)
    yield Technique("Mirostat 2 (sampled)", sampling=steered)


def opened(model: Any, technique: Technique, texts: list[str]) -> LLM:
    more = {"calibration": texts} if technique.calibrated else {}
    return LLM(
        model, max_num_seqs=1, max_num_batched_tokens=32, max_model_len=1024, progress=False, prefix_cache=False,
        skip_tokenizer_init=model != "demo", **technique.options, **more,
    )  # fmt: skip


def seconds(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> float:
    """Seconds a generated token, one prompt after the other; what prompts take beside them is in both."""
    start = perf_counter()
    for prompt in prompts:
        llm.generate(prompt, params, use_tqdm=False)
    return (perf_counter() - start) / (len(prompts) * OUTPUT)


def ratio(plain: LLM, llm: LLM, technique: Technique, prompts: list[list[int]], rounds: int) -> float:
    """How many times as fast as plain decoding."""
    both = {
        "plain": lambda: seconds(plain, prompts, GREEDY),
        "ours": lambda: seconds(llm, prompts, technique.sampling),
    }
    times = interleaved(both, rounds)
    return times["plain"] / times["ours"]


def read(llm: LLM, technique: Technique, tokens: np.ndarray, size: int) -> tuple[float, float]:
    """(bits a byte, bytes of keys and values a token) of texts i32[B,T+1] read through what this LLM remembers."""
    programs, length = llm.engine.programs, tokens.shape[1] - 1
    stored = {"int8": jnp.int8}.get(technique.options.get("kv_cache_dtype", ""))
    reader = Reader(programs.graphdef, llm.config, llm.cache, len(tokens), length, stored)
    nats = np.asarray(reader.run(programs.params, jnp.asarray(tokens)), np.float64)[length // 2 :].sum()
    return nats / np.log(2) / size, reader.bytes_a_token()


def accepted(llm: LLM, prompts: list[list[int]], others: list[list[int]]) -> tuple[float, list[float]]:
    """(tokens a step, share of steps that emit at least 1, 2, ... tokens), after what is kept has seen `others`."""
    speculation = llm.engine.programs.speculation
    if speculation is None:
        return 1.0, []
    for text in others:
        llm.generate(text, GREEDY, use_tqdm=False)
    speculation.acceptance = type(speculation.acceptance)()
    for text in prompts:
        llm.generate(text, GREEDY, use_tqdm=False)
    seen = speculation.acceptance
    return seen.tokens_per_step, [one / seen.rows for one in seen.emitted]


def weights(llm: LLM) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(llm.engine.programs.params))


def draw(pictures: Path, places: dict[str, list[float]], losses: dict[str, tuple[float, float]]) -> None:
    """Two pictures: how many steps emit at least so many tokens, and what bytes of a cache buy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pictures.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, shares in places.items():
        axes.plot(range(1, len(shares) + 1), shares, marker="o", label=name)
    axes.set(
        xlabel="at least so many tokens",
        ylabel="share of steps",
        title="Drafts accepted, by position",
        ylim=(0, 1.05),
    )
    axes.legend()
    figure.savefig(pictures / "acceptance.svg", metadata={"Date": None})
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, (held, loss) in losses.items():
        axes.scatter(held, loss)
        axes.annotate(name, (held, loss), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set(
        xlabel="bytes of keys and values a token",
        ylabel="bits a byte of held-out text",
        title="What caches cost",
    )
    figure.savefig(pictures / "caches.svg", metadata={"Date": None})


@dataclass
class Bench:
    """What all techniques are measured against; `texts` calibrate those that ask for it."""

    wanted: list[Technique]
    raw: Tokenizer
    texts: list[str]
    prompts: list[list[int]]
    others: list[list[int]]

    def quality(self, tokens: np.ndarray, pictures: Path | None) -> list[tuple[str, ...]]:
        """A row a technique; tokens i32[B,T+1] are read through it."""
        half = (tokens.shape[1] - 1) // 2 + 1
        size = sum(len(self.raw.decode(row[half:].tolist()).encode()) for row in tokens)
        rows = [("technique", "tokens a step", "KV bytes a token", "weight bytes", "bits a byte")]
        places, losses, full, plain_weights = {}, {}, 0.0, 0
        for technique in (PLAIN, *(one for one in self.wanted if one.sampling is GREEDY)):
            with opened("demo", technique, self.texts) as llm:
                plain_weights = plain_weights or weights(llm)
                kept = weights(llm) / plain_weights
                tokens_a_step, shares = accepted(llm, self.prompts, self.others)
                drafts = "drafter" in technique.options
                loss, held = (full, 0.0) if drafts else read(llm, technique, tokens, size)
            full = full or loss
            change = "as plain" if drafts else f"{loss:.4f} ({loss / full - 1:+.2%})"
            memory = "as plain, and drafts" if drafts else f"{held:.0f}"
            rows.append((technique.name, f"{tokens_a_step:.2f}", memory, f"{kept:.3f}", change))
            print(*rows[-1], sep="  ", flush=True)
            if shares:
                places[technique.name] = shares
            if technique is PLAIN or technique.options.keys() & {"cache", "kv_cache_dtype"}:
                losses[technique.name] = held, loss
        if pictures:
            draw(pictures, places, losses)
        return rows

    def times(self, rounds: int) -> list[tuple[str, ...]]:
        """A row a technique: how many times as fast as plain decoding."""
        bare = checkpoint()
        rows = [("technique", "embedded model", "bare 125M")]
        with opened("demo", PLAIN, []) as plain, opened(bare, PLAIN, []) as plain_bare:
            for technique in self.wanted:
                cells = []
                for beside, model in ((plain, "demo"), (plain_bare, bare)):
                    if model == bare and (not technique.bare or technique.calibrated):
                        cells.append("-")
                        continue
                    prompts = self.prompts if model == "demo" else [self.prompts[0][:32]]
                    with opened(model, technique, self.texts if technique.calibrated else []) as llm:
                        accepted(llm, [], self.others if model == "demo" else [])
                        cells.append(f"{ratio(beside, llm, technique, prompts, rounds):.2f}")
                rows.append((technique.name, *cells))
                print(*rows[-1], sep="  ", flush=True)
                gc.collect()
        return rows


def write(part: str, rows: list[tuple[str, ...]]) -> None:
    """Put a table into the document, between the marks of its part."""
    begin, end = f"<!-- {part} -->", f"<!-- end of {part} -->"
    before, rest = DOCUMENT.read_text().split(begin)
    DOCUMENT.write_text(before + begin + "\n" + table(rows) + "\n" + end + rest.split(end)[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", choices=["quality", "times"], default=["quality", "times"])
    parser.add_argument("--only", nargs="*", help="techniques whose names begin so")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/techniques.md")
    parser.add_argument("--pictures", type=Path, help="a folder for two pictures")
    arguments = quiet_arguments(parser, loaded="times mean little, the other figures are as they are")
    raw = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    training, held = data.split(data.collect(data.standard_library()))
    prompts = [raw.encode(text[1000:]).ids[:PROMPT] for text in held_out(2 * arguments.prompts)]
    names = tuple(arguments.only or ("",))
    wanted = [one for one in techniques(arguments.context) if one.name.startswith(names)]
    texts = [one.text for one in training[:: len(training) // 24]]
    bench = Bench(wanted, raw, texts, prompts[: arguments.prompts], prompts[arguments.prompts :])
    found = {}
    if "quality" in arguments.parts:
        tokens = blocks([one.text for one in held], raw, arguments.windows, arguments.context + 1)
        found["quality"] = bench.quality(tokens, arguments.pictures)
    if "times" in arguments.parts:
        found["times"] = bench.times(arguments.rounds)
        still_quiet(arguments)
    for part, rows in found.items():
        print(table(rows))
        if arguments.write:
            write(part, rows)


if __name__ == "__main__":
    main()
