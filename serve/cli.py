"""The command line: generate, chat, info, bench, tune, plan, compile, batch, serve, watch, timeline."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import compile_command
from .device_options import device_options, devices, several, split_options, together
from .planner.command import add_command

API_KEY = "TOKENLOOM_API_KEY"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; user mistakes end with one line on stderr and exit code 2."""
    arguments = parser().parse_args(argv)
    try:
        return together(arguments) if several(arguments) else arguments.run(arguments)
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
        device_options(command)
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
    device_options(bench)
    bench.add_argument("--config", type=Path, help="a config.json: measure it with random weights")
    bench.add_argument("--batch", type=int, default=1, help="sequences that decode together")
    bench.add_argument("--prompt-len", type=int, default=128)
    bench.add_argument("--output-len", type=int, default=64)
    bench.add_argument("--repeat", type=int, default=3)
    bench.set_defaults(run=_bench)

    _tune_options(commands)
    add_command(commands)
    compile_command.add_command(commands, _engine_options, split_options)
    _batch_options(commands)
    _serve_options(commands)
    _telemetry_options(commands)
    return top


def _tune_options(commands: Any) -> None:
    tune = commands.add_parser(
        "tune", help="measure tiles of the attention kernels on this device; engines use them from then on"
    )
    tune.add_argument("--model", help="a folder, a hub name, or demo: its attention layers")
    tune.add_argument("--heads", type=int, default=32, help="without --model: query heads")
    tune.add_argument("--kv-heads", type=int, default=8)
    tune.add_argument("--head-dim", type=int, default=128)
    tune.add_argument("--dtype", help="dtype of the model; default: what suits the device")
    tune.add_argument("--kv-cache-dtype", help="how pages are stored, such as int8; default: as the model")
    tune.add_argument("--page-size", type=int, help="default: the engine's")
    tune.add_argument("--max-model-len", type=int, help="default: the model's, or 4096")
    tune.add_argument("--max-num-seqs", type=int, default=8)
    tune.add_argument("--max-num-batched-tokens", type=int, default=512)
    tune.add_argument("--quick", action="store_true", help="one decode and the largest chunk, two rounds")
    tune.set_defaults(run=_tune)


def _batch_options(commands: Any) -> None:
    batch = commands.add_parser(
        "batch", help="answer a JSONL file of requests in OpenAI's batch format; goes on after a kill",
        epilog="exit codes: 0 every line has a result; 1 all are answered, some with an error; 2 the job cannot "
        "start (a wrong setting, a changed input); 3 it stopped (disk full, output removed, engine failure): run "
        "again to go on; 130 and 143 after SIGINT and SIGTERM: what was complete is written, run again to go on",
    )  # fmt: skip
    batch.add_argument("input", type=Path)
    batch.add_argument("-o", "--output", type=Path, required=True, help="results, a line each; appended to")
    _model_options(batch)
    _size_options(batch)
    batch.add_argument("--seed", type=int, default=0, help="with its custom_id, seeds a request without seed")
    batch.add_argument(
        "--shard", default="0/1", metavar="I/N", help="only the custom_ids that hash to I modulo N"
    )
    batch.add_argument("--no-progress", action="store_true")
    batch.set_defaults(run=_batch)


def _serve_options(commands: Any) -> None:
    serve = commands.add_parser("serve", help="an OpenAI-compatible HTTP server (needs tokenloom[serve])")
    serve.add_argument("model", nargs="?", default="demo", help="a folder, a hub name, or demo (the default)")
    serve.add_argument("--dtype", help="dtype of the stored weights; default: what suits the device")
    serve.add_argument("--max-model-len", type=int)
    compile_command.compiled_option(serve)
    _size_options(serve)
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000, help="0: a free one, printed when the server is up")
    serve.add_argument("--api-key", help="required from clients; default: $TOKENLOOM_API_KEY, else none")
    serve.add_argument("--max-body-bytes", type=int, default=4 << 20, help="longer requests get 413")
    serve.add_argument("--max-waiting", type=int, default=256, help="with so many waiting, requests get 429")
    serve.add_argument(
        "--shutdown-seconds", type=int, default=30, help="after SIGTERM, requests have so long to finish"
    )
    serve.set_defaults(run=_serve)


def _telemetry_options(commands: Any) -> None:
    watch = commands.add_parser("watch", help="follow a telemetry file: speed, ceilings, what binds")
    watch.add_argument("path", type=Path, help="what LLM(telemetry=...) writes")
    watch.add_argument("--once", action="store_true", help="print one view and end")
    watch.set_defaults(run=_watch)
    timeline = commands.add_parser("timeline", help="draw a telemetry file (needs tokenloom[plots])")
    timeline.add_argument("path", type=Path, help="what LLM(telemetry=...) wrote")
    timeline.add_argument("-o", "--output", type=Path, required=True, help="run.png, .svg or .pdf")
    timeline.set_defaults(run=_timeline)


def _size_options(command: argparse.ArgumentParser) -> None:
    _engine_options(command)
    device_options(command)
    command.add_argument(
        "--served-model-name", action="append", default=[], help="what requests may call it; may be repeated"
    )


def _engine_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-num-seqs", type=int, default=8, help="sequences that run at once")
    command.add_argument("--max-num-batched-tokens", type=int, default=512, help="token budget of a step")
    command.add_argument(
        "--num-pages", type=int, help="pages of the KV pool; default: what the memory allows"
    )
    command.add_argument("--page-size", type=int, help="tokens a page; default: what suits the lengths")
    command.add_argument("--kv-cache-dtype", help="how keys and values are stored, such as int8 or fp8")


def _model_options(command: argparse.ArgumentParser) -> None:
    compile_command.compiled_option(command)
    command.add_argument("--model", default="demo", help="a folder, a hub name, or demo (the default)")
    command.add_argument("--dtype", help="dtype of the stored weights; default: what suits the device")
    command.add_argument("--max-model-len", type=int)


def _open(arguments: argparse.Namespace, **settings: Any):
    from .llm import LLM

    return LLM(
        arguments.model, dtype=arguments.dtype, max_model_len=arguments.max_model_len,
        compiled=arguments.compiled, **devices(arguments), **settings,
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
    with _open(arguments, **compile_command.request_sizes(arguments.compiled)) as llm:
        if llm.follow():
            return 0
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
    from .describe import describe

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
    seats = -(-arguments.batch // max(1, arguments.data_parallel_size))
    sizes = dict(max_num_seqs=seats, max_num_batched_tokens=max(512, seats + 1))
    if arguments.config is None:
        llm = _open(arguments, **sizes)
    else:
        raw = json.loads(arguments.config.read_text())
        llm = LLM.from_config(
            raw, dtype=arguments.dtype, max_model_len=arguments.max_model_len, compiled=arguments.compiled,
            **devices(arguments), **sizes,
        )  # fmt: skip
    with llm:
        if llm.follow():
            return 0
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


def _tune(arguments: argparse.Namespace) -> int:
    from .tune import run

    run(
        arguments.model, (arguments.heads, arguments.kv_heads, arguments.head_dim), arguments.dtype,
        arguments.kv_cache_dtype, arguments.page_size, arguments.max_model_len, arguments.max_num_seqs,
        arguments.max_num_batched_tokens, arguments.quick,
    )  # fmt: skip
    return 0


def _sizes(arguments: argparse.Namespace) -> dict[str, Any]:
    names = (
        "max_num_seqs", "max_num_batched_tokens", "num_pages", "page_size", "kv_cache_dtype",
    )  # fmt: skip
    return {name: getattr(arguments, name) for name in names}


def _batch(arguments: argparse.Namespace) -> int:
    from .batch import run_batch
    from .batch_files import BatchStopped

    match = re.fullmatch(r"(\d+)/(\d+)", arguments.shard)
    if match is None:
        raise ValueError(
            f"--shard {arguments.shard} must look like 0/4: this process's number and how many there are"
        )
    if not arguments.input.is_file() and not arguments.follows:
        raise ValueError(
            f"the input {arguments.input} is not a file; give a JSONL file with a request a line"
        )
    show = not arguments.no_progress
    with _open(arguments, progress=show, **_sizes(arguments)) as llm:
        if llm.follow():
            return 0
        try:
            summary = run_batch(
                llm, arguments.input, arguments.output, seed=arguments.seed, progress=show,
                shard=(int(match[1]), int(match[2])), served_model_names=arguments.served_model_name,
            )  # fmt: skip
        except BatchStopped as error:
            print(f"tokenloom: {error}", file=sys.stderr)
            return 3
    print(summary, file=sys.stderr)
    return 1 if summary.failed or summary.failed_earlier else 0


def _serve(arguments: argparse.Namespace) -> int:
    from .server import EXTRA, need, serve

    for name in () if arguments.follows else EXTRA:  # before the model is loaded
        need(name)
    with _open(arguments, **_sizes(arguments)) as llm:
        if llm.follow():
            return 0
        serve(
            llm, host=arguments.host, port=arguments.port, api_key=arguments.api_key or os.environ.get(API_KEY),
            max_body_bytes=arguments.max_body_bytes, max_waiting=arguments.max_waiting,
            shutdown_seconds=arguments.shutdown_seconds, served_model_names=arguments.served_model_name,
        )  # fmt: skip
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    from .telemetry.live import watch

    watch(arguments.path, once=arguments.once)
    return 0


def _timeline(arguments: argparse.Namespace) -> int:
    from .telemetry.timeline import timeline

    timeline(arguments.path).savefig(arguments.output, dpi=120)
    return 0


if __name__ == "__main__":
    sys.exit(main())
