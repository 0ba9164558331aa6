"""Tokenloom: a JAX/XLA inference stack for language models. See README.md.

Nothing is imported until it is used, so `import tokenloom` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model.transforms.cats import CATS
    from .model.transforms.fp8 import Fp8
    from .model.transforms.int4 import Int4
    from .model.transforms.int8 import Int8
    from .model.transforms.outlier_suppression_plus import OutlierSuppressionPlus
    from .serve.bounds import QueueFull
    from .serve.drafters.copy_spec import CopySpec
    from .serve.drafters.draft_model import DraftModel
    from .serve.drafters.rsd import RSDC, RSDS
    from .serve.drafters.smart_spec import SmartSpec
    from .serve.drafters.spectr import SpecTr
    from .serve.drafters.token_recycling import TokenRecycling
    from .serve.llm import LLM
    from .serve.outputs import CompletionOutput, RequestOutput
    from .serve.planner.plan import plan
    from .serve.policies.batch_llm import BatchLLM
    from .serve.policies.castillo import Castillo
    from .serve.policies.fair import Fair
    from .serve.policies.prefill_first import PrefillFirst
    from .serve.policies.priority import Priority
    from .serve.policies.sarathi import SarathiServe
    from .serve.policies.split_fuse import SplitFuse
    from .serve.repetition import RepetitionDetectionParams
    from .serve.sampling.params import SamplingParams
    from .serve.sampling.structured import StructuredOutputs
    from .serve.search.best_of_n import BestOfN
    from .serve.search.first_finish import FirstFinish
    from .serve.search.majority_vote import MajorityVote

_HOMES = {
    "LLM": "serve.llm",
    "SamplingParams": "serve.sampling.params",
    "RequestOutput": "serve.outputs",
    "CompletionOutput": "serve.outputs",
    "RepetitionDetectionParams": "serve.repetition",
    "StructuredOutputs": "serve.sampling.structured",
    "plan": "serve.planner.plan",
    "QueueFull": "serve.bounds",
    "SarathiServe": "serve.policies.sarathi",
    "SplitFuse": "serve.policies.split_fuse",
    "PrefillFirst": "serve.policies.prefill_first",
    "Priority": "serve.policies.priority",
    "Fair": "serve.policies.fair",
    "BatchLLM": "serve.policies.batch_llm",
    "Castillo": "serve.policies.castillo",
    "CopySpec": "serve.drafters.copy_spec",
    "DraftModel": "serve.drafters.draft_model",
    "RSDC": "serve.drafters.rsd",
    "RSDS": "serve.drafters.rsd",
    "SmartSpec": "serve.drafters.smart_spec",
    "SpecTr": "serve.drafters.spectr",
    "TokenRecycling": "serve.drafters.token_recycling",
    "BestOfN": "serve.search.best_of_n",
    "FirstFinish": "serve.search.first_finish",
    "MajorityVote": "serve.search.majority_vote",
    "Int8": "model.transforms.int8",
    "Int4": "model.transforms.int4",
    "Fp8": "model.transforms.fp8",
    "OutlierSuppressionPlus": "model.transforms.outlier_suppression_plus",
    "CATS": "model.transforms.cats",
}

__version__ = "0.1.0"
__all__ = [
    "CATS",
    "LLM",
    "RSDC",
    "RSDS",
    "BatchLLM",
    "BestOfN",
    "Castillo",
    "CompletionOutput",
    "CopySpec",
    "DraftModel",
    "Fair",
    "FirstFinish",
    "Fp8",
    "Int4",
    "Int8",
    "MajorityVote",
    "OutlierSuppressionPlus",
    "PrefillFirst",
    "Priority",
    "QueueFull",
    "RepetitionDetectionParams",
    "RequestOutput",
    "SamplingParams",
    "SarathiServe",
    "SmartSpec",
    "SpecTr",
    "SplitFuse",
    "StructuredOutputs",
    "TokenRecycling",
    "__version__",
    "plan",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"tokenloom has no {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
