"""tokenloom compile, and --compiled of the other commands."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_command(commands: Any, *options: Callable[[argparse.ArgumentParser], None]) -> None:
    """Register `compile` with the command line's parsers; `options` add those of an engine."""
    found = commands.add_parser(
        "compile", help="write a model's compiled programs to a folder; engines start on it without compiling",
        epilog="the folder is code for this version, these settings and this kind of device; give it to the other "
        "commands as --compiled FOLDER, with the same engine options, and only when you trust who wrote it",
    )  # fmt: skip
    found.add_argument("model", nargs="?", default="demo", help="a folder, a hub name, or demo (the default)")
    found.add_argument("-o", "--output", type=Path, required=True, help="a new folder")
    found.add_argument(
        "--topology",
        help="a slice of TPUs that is not here, such as v5e:2x4 (needs libtpu; reads no weights)",
    )
    found.add_argument("--dtype", help="dtype of the stored weights; default: what suits the device")
    found.add_argument("--max-model-len", type=int)
    for add in options:
        add(found)
    found.set_defaults(run=_run)


def compiled_option(command: argparse.ArgumentParser) -> None:
    """Add --compiled to a command."""
    command.add_argument(
        "--compiled",
        type=Path,
        metavar="FOLDER",
        help="start on what `tokenloom compile` wrote; it is code: trust it",
    )


def request_sizes(compiled: Path | None) -> dict[str, int]:
    """An engine's sizes for one request, or those that the folder's programs were written for."""
    if compiled is None:
        return dict(max_num_seqs=1, max_num_batched_tokens=256)
    from .compiled import Artefact

    engine = Artefact.of(compiled).manifest["facts"]["engine"]
    return {name: engine[name] for name in ("max_num_seqs", "max_num_batched_tokens")}


def _run(arguments: argparse.Namespace) -> int:
    import jax

    from .compile_model import compile_for, compile_model
    from .compiled import MANIFEST

    names = (
        "dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_pages", "page_size",
        "kv_cache_dtype", "tensor_parallel_size", "sequence_parallel_size", "decode_context_parallel_size",
        "enable_expert_parallel",
    )  # fmt: skip
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    if arguments.topology is None:
        folder = compile_model(arguments.model, arguments.output, progress=True, **settings)
    else:
        # Only compile-only devices are used: an accelerator that is here stays free.
        jax.config.update("jax_platforms", "cpu")
        folder = compile_for(arguments.model, arguments.topology, arguments.output, progress=True, **settings)
    manifest = json.loads((folder / MANIFEST).read_text())
    device, engine = manifest["facts"]["device"], manifest["facts"]["engine"]
    total = sum(entry["bytes"] for entry in manifest["programs"])
    print(
        f"{folder}: {len(manifest['programs'])} programs, {total / 1e6:.1f} MB, for {device['count']} x "
        f"{device['kind']}; max_model_len {engine['max_model_len']}, num_pages {engine['num_pages']}"
    )
    return 0
