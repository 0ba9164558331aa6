"""What the benchmarks share: shapes, a checkpoint of random weights, a quiet-machine check, interleaved timing."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

LLAMA_125M = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 2048,
    "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "float32", "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
K = TypeVar("K")
EXIT_LOADED, EXIT_NO_DEVICE = 3, 4
REST = 0.3


def checkpoint(raw: dict = LLAMA_125M, seed: int = 0) -> Path:
    """A folder with random float32 weights under Hugging Face names, made once a machine."""
    from safetensors.numpy import save_file

    folder = (
        Path(tempfile.gettempdir())
        / f"tokenloom-bench-{raw['hidden_size']}x{raw['num_hidden_layers']}-{seed}"
    )
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(exist_ok=True)
    draw, E, V = np.random.default_rng(seed), raw["hidden_size"], raw["vocab_size"]
    inner = raw["intermediate_size"]
    q, kv = (raw[key] * raw["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, E), "lm_head.weight": (V, E)}
    for layer in range(raw["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        sizes = {"q": (q, E), "k": (kv, E), "v": (kv, E), "o": (E, q)}
        shapes |= {f"{at}self_attn.{name}_proj.weight": shape for name, shape in sizes.items()}
        sizes = {"gate": (inner, E), "up": (inner, E), "down": (E, inner)}
        shapes |= {f"{at}mlp.{name}_proj.weight": shape for name, shape in sizes.items()}
    tensors = {
        name: draw.standard_normal(shape, np.float32) * np.float32(shape[1] ** -0.5)
        for name, shape in shapes.items()
    }
    for layer in range(raw["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = np.ones(E, np.float32)
    tensors["model.norm.weight"] = np.ones(E, np.float32)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def others_load(seconds: float = 1.0) -> float:
    """Cores that other processes kept busy while this one slept."""

    def busy() -> int:
        fields = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        return sum(fields) - fields[3] - fields[4]

    before = busy()
    time.sleep(seconds)
    return (busy() - before) / os.sysconf("SC_CLK_TCK") / seconds


def require_quiet(limit: float = 0.2) -> None:
    """No figure when something else loads the machine."""
    load = others_load()
    if load > limit:
        print(f"other processes keep {load:.2f} cores busy (limit {limit}): no figures from this run")
        sys.exit(EXIT_LOADED)


def quiet_arguments(parser: argparse.ArgumentParser, loaded: str) -> argparse.Namespace:
    """The command's arguments, with --allow-load beside its own: without it a loaded machine ends the run, with it
    `loaded` says what its figures are worth."""
    parser.add_argument(
        "--allow-load", action="store_true", help="print times though others load the machine"
    )
    arguments = parser.parse_args()
    if not arguments.allow_load:
        require_quiet()
    elif others_load() > 0.2:
        print(f"loaded machine: {loaded}")
    return arguments


def still_quiet(arguments: argparse.Namespace) -> None:
    """At the end: the machine has to be as quiet as it was."""
    if not arguments.allow_load:
        require_quiet()


def read_bandwidth(megabytes: int = 1024) -> float:
    """GB/s of summing a float32 array that no cache holds, one thread a core; the best of 5."""
    data = np.ones(megabytes << 18, np.float32)
    parts = np.array_split(data, os.cpu_count() or 1)
    best = 0.0
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.add.reduce, parts))
            best = max(best, data.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def interleaved(contenders: dict[K, Callable[[], float]], rounds: int = 5) -> dict[K, float]:
    """Run each contender once to warm up, then all in turn, `rounds` times; the smallest figure of each. Each waits a
    moment, for some libraries' threads go on spinning when their work is done."""
    for run in contenders.values():
        run()
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(rounds):
        for name, run in contenders.items():
            time.sleep(REST)
            best[name] = min(best[name], run())
    return best


def table(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; the first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def use_device(platform: str) -> Any:
    """The first device of "gpu", "tpu" or "cpu", made JAX's default; ends the process when there is none. Call it
    before anything runs."""
    import jax

    jax.config.update("jax_platforms", {"gpu": "cuda,cpu", "tpu": "tpu,cpu"}.get(platform, platform))
    try:
        return jax.devices(platform)[0]
    except RuntimeError as error:
        print(f"no {platform} here ({str(error).splitlines()[0]}): no figures from this run")
        sys.exit(EXIT_NO_DEVICE)


def copy_bandwidth(megabytes: int) -> float:
    """Bytes a second, read and written, of copying an array on the default device; the best of 5 bursts."""
    import jax
    import jax.numpy as jnp
    from tokenloom.serve.workload import side_by_side

    data = jnp.ones((megabytes << 18,), jnp.int32)
    copy = jax.jit(lambda a: a + 1)  # a plain copy may become no operation at all
    return 2 * data.nbytes / side_by_side([lambda: copy(data)], 5, seconds=0.1)[0]


def matmul_rate(side: int, dtype: str = "bfloat16") -> float:
    """Floating-point operations a second of a square product on the default device; a multiply-add is two."""
    import jax
    import jax.numpy as jnp
    from tokenloom.serve.workload import side_by_side

    a, b = (jax.random.normal(jax.random.key(seed), (side, side), jnp.dtype(dtype)) for seed in (0, 1))
    product = jax.jit(lambda a, b: a @ b)
    return 2 * side**3 / side_by_side([lambda: product(a, b)], 5, seconds=0.1)[0]
