"""tokenloom plan: a model on a slice of TPUs that is not here."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_command(commands: Any) -> None:
    """Register `plan` with the command line's parsers."""
    plan = commands.add_parser(
        "plan", help="what a model needs on a TPU slice, and how fast it could be; no TPU, no weights",
        epilog="exit codes: 0 it fits; 1 it does not (what would fit is printed); 2 it cannot be",
    )  # fmt: skip
    plan.add_argument("model", help="a name such as llama-3.1-70b, a config.json, or a checkpoint's folder")
    plan.add_argument(
        "--topology", required=True, help="a slice: v5e:4x4 as JAX names it, or v5e-16 as the cloud does"
    )
    plan.add_argument(
        "--plan", default="auto", help="auto, or factors: tensor=8; data=2,tensor=4; seq=2,tensor=4; expert=8"
    )
    plan.add_argument("--max-model-len", type=int, help="default: 8192, or what the model can")
    plan.add_argument("--max-num-seqs", type=int, help="a replica; default: as many as fit, up to 256")
    plan.add_argument("--max-num-batched-tokens", type=int, default=512, help="token budget of a step")
    plan.add_argument("--kv-cache-dtype", help="how keys and values are stored, such as int8 or fp8")
    plan.add_argument("--dtype", help="dtype of weights and activations; default: the checkpoint's")
    plan.add_argument("--full", action="store_true", help="compile every program, not one step of each kind")
    plan.add_argument("--predict-only", action="store_true", help="compile nothing")
    plan.add_argument(
        "--plot", metavar="PATH", help="also draw a .png, .svg or .pdf (needs tokenloom[plots])"
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import jax
    from rich.console import Console

    from .plan import plan
    from .table import as_tables

    # Only compile-only devices are used: an accelerator that is here stays free.
    jax.config.update("jax_platforms", "cpu")
    report = plan(
        arguments.model, arguments.topology, plan=arguments.plan, max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.max_num_seqs, max_num_batched_tokens=arguments.max_num_batched_tokens,
        kv_cache_dtype=arguments.kv_cache_dtype, dtype=arguments.dtype, compile=not arguments.predict_only,
        full=arguments.full,
    )  # fmt: skip
    if arguments.plot:
        report.plot(arguments.plot)
    if arguments.json:
        print(report.to_json())
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(as_tables(report))
    return 0 if report.fits else 1
