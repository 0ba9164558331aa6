"""The command line: generate, chat, info, bench."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; user mistakes end with one line on stderr and exit code 2."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except ValueError as error:
        print(f"tokenloom: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("tokenloom", description="Language-model inference in JAX.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue a prompt and stream the text")
    generate.add_argument("prompt")
    generate.set_defaults(run=_generate)
    chat = commands.add_parser("chat", help="answer one message and stream the text")
    chat.add_argument("prompt", metavar="message")
    chat.set_defaults(run=_chat)
    for command in (generate, chat):
        _model_options(command)
        command.add_argument("--max-tokens", type=int, default=128)
        command.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
        command.add_argument("--top-p", type=float, default=1.0)
        command.add_argument("--top-k", type=int, default=0)
        command.add_argument("--seed", type=int)
        command.add_argument(
            "--stop", action="append", help="end the output here; may be given several times"
        )

    info = commands.add_parser("info", help="family, parameters, memory and bucket plan of a model")
    info.add_argument("model", nargs="?", default="demo")
    info.add_argument("--max-model-len", type=int)
    info.add_argument("--max-num-seqs", type=int, default=8)
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=_info)

    bench = commands.add_parser("bench", help="measure prefill and decode of a model or a config.json")
    _model_options(bench)
    bench.add_argument("--config", type=Path, help="a config.json: measure it with random weights")
    bench.add_argument("--batch", type=int, default=1, help="sequences that decode together")
    bench.add_argument("--prompt-len", type=int, default=128)
    bench.add_argument("--output-len", type=int, default=64)
    bench.add_argument("--repeat", type=int, default=3)
    bench.set_defaults(run=_bench)
    return top


def _model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="demo", help="a folder, a hub name, or demo (the default)")
    command.add_argument("--dtype", help="dtype of the stored weights; default: what suits the device")
    command.add_argument("--max-model-len", type=int)


def _open(arguments: argparse.Namespace, **settings: Any):
    from .llm import LLM

    return LLM(
        arguments.model, dtype=arguments.dtype, max_model_len=arguments.max_model_len, **settings
    )  # fmt: skip


def _generate(arguments: argparse.Namespace) -> int:
    return _stream(arguments, lambda llm: arguments.prompt)


def _chat(arguments: argparse.Namespace) -> int:
    return _stream(arguments, lambda llm: llm.chat_prompt([{"role": "user", "content": arguments.prompt}]))


def _stream(arguments: argparse.Namespace, prompt: Any) -> int:
    from .sampling.params import SamplingParams

    params = SamplingParams(
        max_tokens=arguments.max_tokens, temperature=arguments.temperature, top_p=arguments.top_p,
        top_k=arguments.top_k, seed=arguments.seed, stop=arguments.stop,
    )  # fmt: skip
    with _open(arguments, max_num_seqs=1, max_num_batched_tokens=256) as llm:
        started = time.perf_counter()
        first = None
        stream = llm.stream(prompt(llm), params)
        for piece in stream:
            first = first or time.perf_counter()
            print(piece, end="", flush=True)
        ended = time.perf_counter()
        print()
        count = len(stream.output.outputs[0].token_ids)
        wait = (first or ended) - started
        rate = (count - 1) / (ended - (first or ended)) if count > 1 and ended > (first or ended) else 0.0
        print(f"[{count} tokens, {rate:.1f} tokens/s, first token after {wait:.3f} s]", file=sys.stderr)
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from ..model import checkpoint
    from .build import describe

    facts = describe(
        checkpoint.resolve(arguments.model), max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.max_num_seqs,
    )  # fmt: skip
    if arguments.json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            print(f"{name.replace('_', ' '):24} {value}")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from .bench import measure
    from .llm import LLM

    length = arguments.prompt_len + arguments.output_len
    sizes = dict(max_num_seqs=arguments.batch, max_num_batched_tokens=max(512, arguments.batch + 1))
    if arguments.config is None:
        llm = _open(arguments, **sizes)
    else:
        raw = json.loads(arguments.config.read_text())
        llm = LLM.from_config(raw, dtype=arguments.dtype, max_model_len=arguments.max_model_len, **sizes)
    with llm:
        if length > llm.engine.max_model_len:
            raise ValueError(
                f"--prompt-len {arguments.prompt_len} + --output-len {arguments.output_len} exceed "
                f"max_model_len {llm.engine.max_model_len}; lower them or raise --max-model-len"
            )
        print(llm)
        for line in measure(
            llm, arguments.batch, arguments.prompt_len, arguments.output_len, arguments.repeat
        ):
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
