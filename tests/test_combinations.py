"""Across doors: what a drafter gives on top of other plug-ins is what they give without it.

A few pairs here; all of them: `python -m tokenloom.tests.test_combinations`.
"""

from collections.abc import Callable
from typing import Any

import pytest
from tokenloom import (
    CATS,
    LLM,
    BatchLLM,
    CopySpec,
    DraftModel,
    Fp8,
    Int4,
    Int8,
    Priority,
    SplitFuse,
    TokenRecycling,
)
from tokenloom.serve.drafters.draft import Drafter
from tokenloom.tests.engines import greedy, prompts, same_tokens
from tokenloom.tests.shapes import ALL, llama

SIZES = dict(max_num_seqs=2, max_num_batched_tokens=32, page_size=16, progress=False, strict=True)
DRAFTERS: dict[str, Drafter] = {
    "tree": TokenRecycling(nodes=10, depth=3),
    "copy": CopySpec(match=2, copy=5),
    "model": DraftModel(llama(), tokens=2, verify="matching"),
}
# Options of an engine, made anew for each: policies serve one engine only. "config": another model.
OTHERS: dict[str, Callable[[], dict[str, Any]]] = {
    "int8 pages": lambda: {"kv_cache_dtype": "int8"},
    "fp8 pages": lambda: {"kv_cache_dtype": "fp8"},
    "int8 weights": lambda: {"transforms": [Int8(activations=None)]},
    "int4 weights": lambda: {"transforms": [Int4(group_size=32)]},
    "fp8 weights": lambda: {"transforms": [Fp8()]},
    "CATS": lambda: {"transforms": [CATS(0.3)], "calibration": prompts(4, 9)},
    "triton kernels": lambda: {"attention_backend": "triton"},
    "tpu kernels": lambda: {"attention_backend": "tpu"},
    "windows": lambda: {"config": ALL["windowed"]()},
    "experts": lambda: {"config": ALL["experts"]()},
    "BatchLLM": lambda: {"policy": BatchLLM()},
    "SplitFuse": lambda: {"policy": SplitFuse()},
    "priorities": lambda: {"policy": Priority()},
    "no overlap": lambda: {"overlap": False},
    "no prefix cache": lambda: {"prefix_cache": False},
}
IN_CI = [
    ("int8 pages", "tree"),
    ("triton kernels", "tree"),
    ("CATS", "copy"),
    ("int4 weights", "model"),
]


def make(name: str, drafter: Drafter | None) -> LLM:
    options = dict(OTHERS[name]())
    return LLM.from_config(options.pop("config", llama()), 0, drafter=drafter, **SIZES, **options)


def check(name: str, drafter: str) -> float:
    """Asserts equal tokens; returns the tokens a step."""
    drawn = [*prompts(3, 1, longest=60), [5, 6, 7, 8] * 12]
    with make(name, None) as plain, make(name, DRAFTERS[drafter]) as fast:
        for a, b in zip(plain.generate(drawn, greedy(24)), fast.generate(drawn, greedy(24))):
            same_tokens(a, b)
        speculation = fast.engine.programs.speculation
        assert speculation is not None and speculation.acceptance.rows > 0
        return speculation.acceptance.tokens_per_step


@pytest.mark.parametrize(("name", "drafter"), IN_CI)
def test_a_drafter_changes_nothing_beside(name, drafter):
    assert check(name, drafter) >= 1.0


if __name__ == "__main__":
    for name in OTHERS:
        for drafter in DRAFTERS:
            print(f"{name} + {drafter}: {check(name, drafter):.2f} tokens a step", flush=True)
