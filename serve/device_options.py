"""Options of commands that open a model over several devices, or as one of several processes."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def split_options(command: argparse.ArgumentParser) -> None:
    """Over how many devices one model is split."""
    command.add_argument(
        "--tensor-parallel-size", type=int, default=1, help="devices to split the model over"
    )
    command.add_argument(
        "--sequence-parallel-size", type=int, default=1, help="devices to split each text over"
    )
    command.add_argument(
        "--decode-context-parallel-size",
        type=int,
        help="devices with one KV head between them that share its pages; default: all of them; 1: a copy on each",
    )
    command.add_argument(
        "--enable-expert-parallel",
        action="store_true",
        help="experts whole on their devices, of --tensor-parallel-size",
    )


def device_options(command: argparse.ArgumentParser) -> None:
    """The same, replicas, and several processes."""
    split_options(command)
    command.add_argument(
        "--data-parallel-size", type=int, default=1, help="replicas, each on devices of its own"
    )
    command.add_argument(
        "--plan",
        help="these sizes by a name: tensor=8, seq=2,tensor=4, data=2,expert=4; auto: the planner's choice",
    )
    command.set_defaults(follows=False)
    several = command.add_argument_group(
        "several processes or hosts",
        "start the same command everywhere; process 0 answers, the others follow it",
    )
    several.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of process 0; auto: JAX finds all three itself (TPU VMs, Slurm)",
    )
    several.add_argument("--num-processes", type=int, metavar="N")
    several.add_argument("--process-id", type=int, metavar="I", help="0 to N - 1")
    several.add_argument(
        "--process-timeout",
        type=float,
        default=60,
        metavar="SECONDS",
        help="of silence: a process is lost then",
    )


def several(arguments: argparse.Namespace) -> bool:
    """Whether a command was started as one of several processes."""
    given = vars(arguments)
    return any(given.get(name) is not None for name in ("coordinator", "num_processes", "process_id"))


def together(arguments: argparse.Namespace) -> int:
    """Run a command as one of several processes."""
    import jax

    from .joining import ProcessLost, initialize
    from .processes import EXIT_CODE

    where = arguments.coordinator, arguments.num_processes, arguments.process_id
    initialize(*(where if where[0] != "auto" else ()), timeout=arguments.process_timeout)
    arguments.follows = jax.process_index() > 0
    try:
        return arguments.run(arguments)
    except ProcessLost as error:
        print(f"tokenloom: {error}", file=sys.stderr)
        return EXIT_CODE


def devices(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `LLM` is told of them."""
    names = (
        "tensor_parallel_size", "sequence_parallel_size", "decode_context_parallel_size", "enable_expert_parallel",
        "data_parallel_size", "plan",
    )  # fmt: skip
    return {name: getattr(arguments, name) for name in names}
