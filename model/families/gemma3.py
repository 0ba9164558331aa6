"""Gemma 3 with images (arXiv 2503.19786): its text decoder. The vision tower's weights are left where they are."""

from __future__ import annotations

from dataclasses import replace

from ..config import ModelConfig
from . import common, gemma3_text
from .common import Weights

IGNORED = (r"(model\.)?vision_tower\..*", r"(model\.)?multi_modal_projector\..*")

PREFIXES = ("language_model.model.", "model.language_model.")
"""As published, and as newer releases of transformers name the same weights."""


def config(raw: dict) -> ModelConfig:
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise ValueError(
            "config.json of model_type 'gemma3' has no text_config; complete it from the publisher's file"
        )
    inherited = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "dtype", "torch_dtype")
    text = {**text, **{name: raw[name] for name in inherited if raw.get(name) is not None}}
    # transformers' model with images never applies the text config's cap on logits; published files have none.
    return replace(gemma3_text.config(text), model_type="gemma3", logit_softcap=None)


def weights(config: ModelConfig) -> Weights:
    return common.llama_weights(
        config,
        prefixes=PREFIXES,
        heads=("language_model.lm_head.weight", "lm_head.weight"),
        norms=common.SANDWICH_NORMS,
    )
