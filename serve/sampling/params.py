"""SamplingParams: what one request asks of the sampler, checked when it is built.

Names, defaults and meanings are vLLM's, so that code and request files move over unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np

from ..repetition import RepetitionDetectionParams
from .structured import StructuredOutputs

MAX_N = 16384
MAX_TOKENS = 2**31 - 1
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_TOKENS = 64
MAX_BIASES = 320
MAX_BIAS = 100.0
MAX_BAD_WORDS = 64
MAX_SEED = 2**64 - 1
MAX_REFLECTION_TOKENS = 64
MAX_THINKING_ENDS = 8
MAX_PERIOD = 2**23  # exact in float32
GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Sequences are stored as tuples; token ids are checked by `validate_for`.

    n                    samples per prompt
    temperature          logits are divided by it; 0 (anything under 1e-5) takes the most likely token
    top_p                keep the smallest set of most likely tokens with this probability; 1 keeps all
    top_k                keep this many most likely tokens; 0 or -1 keeps all
    min_p                drop tokens less likely than this fraction of the most likely one
    mirostat_mode        1 or 2: Mirostat of that version instead of top_p, top_k and min_p; 0: off
    mirostat_tau         the mean surprise of a token (bits) that Mirostat steers to
    mirostat_eta         how fast: the share of an error that is corrected at the next token
    repetition_penalty   > 1 discourages tokens of the prompt and the output (Keskar et al. 2019, eq. 1)
    presence_penalty     subtracted once from the logit of each token of the output
    frequency_penalty    subtracted once per occurrence in the output
    logit_bias           token id -> number added to its logit
    reflection_amplitude  CyclicReflex: the logits of reflection tokens rise and fall by this much, in a triangular
                         wave, until thinking ends; 0: off
    reflection_period    tokens of one wave
    reflection_shift     where in the wave the output begins, as a share of the period
    reflection_token_ids  the tokens; None: the tokenizer's forms of "wait", "but" and "alternatively"
    thinking_end_token_ids  the tokens that end thinking; None: the tokenizer's "</think>"
    allowed_token_ids    only these tokens may be sampled
    bad_words            texts that may not be generated: their last token is banned where the output ends
                         in the tokens before it
    stop                 texts that end the output
    stop_token_ids       token ids that end the output
    include_stop_str_in_output  keep the stop text in the output
    ignore_eos           go on after the end-of-text token
    max_tokens           tokens to generate at most; None: as many as the engine allows. An engine's own
                         max_output_tokens goes before it
    min_tokens           end-of-text and stop tokens are banned until so many tokens were generated
    seed                 0 to 2**64 - 1; None: drawn from the engine's seed and the request's index
    logprobs             report so many most likely tokens a step; 0: only the sampled token; None: nothing
    prompt_logprobs      the same for the prompt's tokens
    logprobs_mode        "raw": before the logits processors; "processed": after them
    timeout_s            seconds from arrival, waiting included, after which the request ends with what it has
                         (finish_reason "timeout"); None: no deadline
    repetition_detection  RepetitionDetectionParams, or a dict of its fields: an output that repeats itself ends
                         (finish_reason "repetition"); None: off
    structured_outputs   StructuredOutputs, or a dict of its fields: the text obeys a JSON schema, a regular expression,
                         a choice or a grammar; when that is complete, only end-of-text tokens may follow
    segment_tokens       each sample pauses after so many new tokens (finish_reason "segment"); `LLM.resume`
                         continues it. None: one segment
    detokenize           whether to produce text
    skip_special_tokens, spaces_between_special_tokens  how to produce it
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    mirostat_mode: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    reflection_amplitude: float = 0.0
    reflection_period: int = 600
    reflection_shift: float = 0.0
    reflection_token_ids: Sequence[int] | None = None
    thinking_end_token_ids: Sequence[int] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprobs_mode: Literal["raw", "processed"] = "raw"
    timeout_s: float | None = None
    repetition_detection: RepetitionDetectionParams | Mapping[str, int] | None = None
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None
    segment_tokens: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_lists()
        self._set("structured_outputs", StructuredOutputs.of(self.structured_outputs))
        self._set("repetition_detection", RepetitionDetectionParams.of(self.repetition_detection))
        for name in (
            "include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens",
            "spaces_between_special_tokens",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, bool | np.bool_):
                raise ValueError(f"{name}={value!r} must be True or False")
            self._set(name, bool(value))
        if self.logprobs_mode not in ("raw", "processed"):
            raise ValueError(f'logprobs_mode={self.logprobs_mode!r} must be "raw" or "processed"')
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; "
                "lower min_tokens or raise max_tokens"
            )
        instead = {"top_p": self.top_p < 1, "top_k": self.top_k > 0, "min_p": self.min_p > 0}
        if self.mirostat_mode and any(instead.values()):
            name = next(name for name, used in instead.items() if used)
            raise ValueError(
                f"mirostat_mode={self.mirostat_mode} stands instead of top_p, top_k and min_p, but {name}="
                f"{getattr(self, name)!r}; leave that out, or use mirostat_mode=0"
            )
        if self.stop and not self.detokenize:
            raise ValueError(
                f"stop={self.stop!r} needs text, but detokenize=False; use stop_token_ids, or detokenize=True"
            )

    def _check_numbers(self) -> None:
        real, whole = self._real, self._whole
        f32_max = float(np.finfo(np.float32).max)
        real("temperature", 0.0, f32_max, "use 0 for greedy decoding, 1 for the model's own distribution")
        real("top_p", 0.0, 1.0, "use 1 to keep every token", open_low=True)
        real("min_p", 0.0, 1.0, "use 0 to keep every token")
        real("repetition_penalty", 0.0, f32_max, "use 1 for no penalty", open_low=True)
        real("presence_penalty", -2.0, 2.0, "use 0 for no penalty")
        real("frequency_penalty", -2.0, 2.0, "use 0 for no penalty")
        whole("mirostat_mode", 0, 2, "use 2, or 1 for the first version, or 0 for none")
        real("mirostat_tau", 0.0, 64.0, "it is a surprise in bits, usually 2 to 6")
        real("mirostat_eta", 0.0, 1.0, "use 0.1, or up to 1 for a quicker response")
        real("reflection_amplitude", 0.0, MAX_BIAS, "use 0 for none")
        real("reflection_shift", 0.0, 1.0, "it is a share of the period")
        whole("reflection_period", 2, MAX_PERIOD, "it is a number of tokens, usually 600 to 1200")
        whole("top_k", -1, None, "use 0 or -1 to keep every token")
        whole("n", 1, MAX_N, "ask for at least one sample, and send several requests for more")
        whole("max_tokens", 1, None, "use None for as many as the engine allows", optional=True)
        whole("min_tokens", 0, MAX_TOKENS, "use 0 for no lower limit")
        whole("segment_tokens", 1, None, "use None for one segment", optional=True)
        if self.timeout_s is not None:
            real("timeout_s", 0.0, f32_max, "use None for no deadline", open_low=True)
        whole("seed", 0, MAX_SEED, "use None for a seed from the engine", optional=True)
        for name in ("logprobs", "prompt_logprobs"):
            whole(name, 0, MAX_LOGPROBS, "use None for no log-probabilities", optional=True)

    def _check_lists(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        self._set("stop", _texts("stop", stop, MAX_STOP_STRINGS))
        self._set("bad_words", _texts("bad_words", self.bad_words, MAX_BAD_WORDS))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS))
        for name, limit in (
            ("reflection_token_ids", MAX_REFLECTION_TOKENS), ("thinking_end_token_ids", MAX_THINKING_ENDS),
        ):  # fmt: skip
            self._set(name, _token_ids(name, getattr(self, name), limit))
        allowed = _token_ids("allowed_token_ids", self.allowed_token_ids, None)
        if allowed == ():
            raise ValueError(
                "allowed_token_ids is empty: nothing could be sampled; use None to allow all tokens"
            )
        self._set("allowed_token_ids", allowed)
        self._set("logit_bias", _biases(self.logit_bias))

    def validate_for(self, vocab_size: int, *, tokenizer: bool = True) -> None:
        """Check token ids against the vocabulary, and that text options have a `tokenizer` to serve them."""
        groups = {
            "allowed_token_ids": self.allowed_token_ids,
            "stop_token_ids": self.stop_token_ids,
            "reflection_token_ids": self.reflection_token_ids,
            "thinking_end_token_ids": self.thinking_end_token_ids,
            "logit_bias": self.logit_bias,
        }
        for name, ids in groups.items():
            outside = [i for i in ids or () if i >= vocab_size]
            if outside:
                raise ValueError(
                    f"{name} has token id {outside[0]}, but the vocabulary has {vocab_size} tokens "
                    f"(0 to {vocab_size - 1}); remove it"
                )
        text = [name for name in ("stop", "bad_words", "structured_outputs") if getattr(self, name)]
        if text and not tokenizer:
            raise ValueError(
                f"{text[0]}={getattr(self, text[0])!r} needs a tokenizer and the engine has none; "
                "use token ids, or give the engine a tokenizer"
            )

    @property
    def greedy(self) -> bool:
        """True when the most likely token is taken and nothing is drawn."""
        return self.temperature < GREEDY_BELOW

    @property
    def carries(self) -> bool:
        """True when a generation cannot go on from its tokens alone (`Processor.carried`)."""
        return self.mirostat_mode > 0

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _real(self, name: str, low: float, high: float, remedy: str, open_low: bool = False) -> None:
        value = _number(name, getattr(self, name), Real, "a number", remedy)
        above = value > low if open_low else value >= low
        if not (above and value <= high):
            left = "(" if open_low else "["
            limit = (
                f"{left}{low:g}, {high:g}]" if high < 1e30 else f"{left}{low:g}, inf), and finite in float32"
            )
            raise ValueError(f"{name}={value!r} must lie in {limit}; {remedy}")
        self._set(name, float(value))

    def _whole(self, name: str, low: int, high: int | None, remedy: str, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        value = _number(name, value, Integral, "a whole number", remedy)
        if value < low or (high is not None and value > high):
            limit = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ValueError(f"{name}={value!r} must be {limit}; {remedy}")
        self._set(name, int(value))


def _number(name: str, value: Any, kind: type, words: str, remedy: str) -> Any:
    if isinstance(value, bool | np.bool_) or not isinstance(value, kind):
        raise ValueError(f"{name}={value!r} is a {type(value).__name__} and must be {words}; {remedy}")
    if value != value:
        raise ValueError(f"{name}={value!r} is not a number; {remedy}")
    return value


def _items(name: str, values: Any, limit: int | None) -> tuple:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"{name}={values!r} must be a list")
    items = tuple(values)
    if limit is not None and len(items) > limit:
        raise ValueError(f"{name} has {len(items)} entries and the limit is {limit}; give fewer")
    return items


def _texts(name: str, values: Any, limit: int) -> tuple[str, ...] | None:
    if values is None:
        return None
    items = _items(name, values, limit)
    for item in items:
        if not isinstance(item, str):
            raise ValueError(f"{name} has {item!r}, a {type(item).__name__}; every entry must be a string")
        if not item:
            raise ValueError(f"{name} has an empty string, which would match everywhere; remove it")
    return items


def _token_ids(name: str, values: Any, limit: int | None) -> tuple[int, ...] | None:
    if values is None:
        return None
    return tuple(_token_id(name, item) for item in _items(name, values, limit))


def _token_id(name: str, value: Any) -> int:
    value = _number(f"an entry of {name}", value, Integral, "a token id", "token ids are whole numbers")
    if value < 0:
        raise ValueError(f"{name} has {value!r}, but token ids start at 0; remove it")
    return int(value)


def _biases(values: Any) -> dict[int, float] | None:
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise ValueError(f"logit_bias={values!r} must map token ids to numbers, as in {{50256: -100}}")
    if len(values) > MAX_BIASES:
        raise ValueError(
            f"logit_bias has {len(values)} entries and the limit is {MAX_BIASES}; give fewer, "
            "or use allowed_token_ids"
        )
    biases = {}
    for key, value in values.items():
        token = _token_id("logit_bias", key)
        value = _number(f"logit_bias[{token}]", value, Real, "a number", "use 0 for no bias")
        if not -MAX_BIAS <= value <= MAX_BIAS:
            raise ValueError(
                f"logit_bias[{token}]={value!r} must lie in [{-MAX_BIAS:g}, {MAX_BIAS:g}]; "
                f"use {-MAX_BIAS:g} to all but ban a token"
            )
        biases[token] = float(value)
    return biases
