"""Tokenloom: a JAX/XLA inference stack for language models. See README.md.

Nothing is imported until it is used, so `import tokenloom` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attention.caches.double_sparsity import DoubleSparsity
    from .attention.caches.gear import GEAR, Int4KV
    from .attention.caches.h2o import H2O
    from .attention.caches.minference import MInference
    from .attention.caches.streaming import StreamingLLM
    from .attention.caches.tidal_decode import TidalDecode
    from .model.transforms.cats import CATS
    from .model.transforms.fp8 import Fp8
    from .model.transforms.int4 import Int4
    from .model.transforms.int8 import Int8
    from .model.transforms.outlier_suppression_plus import OutlierSuppressionPlus
    from .model.transforms.skip_decode import SkipDecode
    from .model.transforms.unified_layer_skipping import UnifiedLayerSkipping
    from .serve.bounds import QueueFull
    from .serve.drafters.copy_spec import CopySpec
    from .serve.drafters.draft_model import DraftModel
    from .serve.drafters.early_exit import DEL
    from .serve.drafters.rsd import RSDC, RSDS
    from .serve.drafters.smart_spec import SmartSpec
    from .serve.drafters.spectr import SpecTr
    from .serve.drafters.token_recycling import TokenRecycling
    from .serve.joining import ProcessLost, initialize
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
    from .serve.search.beam_search import BeamSearch
    from .serve.search.best_of_n import BestOfN
    from .serve.search.diverse_beam_search import DiverseBeamSearch
    from .serve.search.first_finish import FirstFinish
    from .serve.search.majority_vote import MajorityVote

_HOMES = {
    "DoubleSparsity": "attention.caches.double_sparsity",
    "GEAR": "attention.caches.gear",
    "H2O": "attention.caches.h2o",
    "Int4KV": "attention.caches.gear",
    "MInference": "attention.caches.minference",
    "StreamingLLM": "attention.caches.streaming",
    "TidalDecode": "attention.caches.tidal_decode",
    "LLM": "serve.llm",
    "SamplingParams": "serve.sampling.params",
    "RequestOutput": "serve.outputs",
    "CompletionOutput": "serve.outputs",
    "RepetitionDetectionParams": "serve.repetition",
    "StructuredOutputs": "serve.sampling.structured",
    "plan": "serve.planner.plan",
    "QueueFull": "serve.bounds",
    "initialize": "serve.joining",
    "ProcessLost": "serve.joining",
    "SarathiServe": "serve.policies.sarathi",
    "SplitFuse": "serve.policies.split_fuse",
    "PrefillFirst": "serve.policies.prefill_first",
    "Priority": "serve.policies.priority",
    "Fair": "serve.policies.fair",
    "BatchLLM": "serve.policies.batch_llm",
    "Castillo": "serve.policies.castillo",
    "CopySpec": "serve.drafters.copy_spec",
    "DraftModel": "serve.drafters.draft_model",
    "DEL": "serve.drafters.early_exit",
    "RSDC": "serve.drafters.rsd",
    "RSDS": "serve.drafters.rsd",
    "SmartSpec": "serve.drafters.smart_spec",
    "SpecTr": "serve.drafters.spectr",
    "TokenRecycling": "serve.drafters.token_recycling",
    "BeamSearch": "serve.search.beam_search",
    "BestOfN": "serve.search.best_of_n",
    "DiverseBeamSearch": "serve.search.diverse_beam_search",
    "FirstFinish": "serve.search.first_finish",
    "MajorityVote": "serve.search.majority_vote",
    "Int8": "model.transforms.int8",
    "Int4": "model.transforms.int4",
    "Fp8": "model.transforms.fp8",
    "OutlierSuppressionPlus": "model.transforms.outlier_suppression_plus",
    "CATS": "model.transforms.cats",
    "SkipDecode": "model.transforms.skip_decode",
    "UnifiedLayerSkipping": "model.transforms.unified_layer_skipping",
}

__version__ = "0.1.0"
__all__ = [
    "CATS",
    "DEL",
    "GEAR",
    "H2O",
    "LLM",
    "RSDC",
    "RSDS",
    "BatchLLM",
    "BeamSearch",
    "BestOfN",
    "Castillo",
    "CompletionOutput",
    "CopySpec",
    "DiverseBeamSearch",
    "DoubleSparsity",
    "DraftModel",
    "Fair",
    "FirstFinish",
    "Fp8",
    "Int4",
    "Int4KV",
    "Int8",
    "MInference",
    "MajorityVote",
    "OutlierSuppressionPlus",
    "PrefillFirst",
    "Priority",
    "ProcessLost",
    "QueueFull",
    "RepetitionDetectionParams",
    "RequestOutput",
    "SamplingParams",
    "SarathiServe",
    "SkipDecode",
    "SmartSpec",
    "SpecTr",
    "SplitFuse",
    "StreamingLLM",
    "StructuredOutputs",
    "TidalDecode",
    "TokenRecycling",
    "UnifiedLayerSkipping",
    "__version__",
    "initialize",
    "plan",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"tokenloom has no {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
