"""Beam search: the texts of highest probability that a breadth-first search of bounded width finds.

Lowerre 1976 (the HARPY system); for neural sequence models Graves 2012 (arXiv 1211.3711) and Sutskever et al. 2014
(arXiv 1409.3215); the length penalty of transformers and vLLM, sum / length ** length_penalty, after Wu et al. 2016
(arXiv 1609.08144), equation 14.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..llm import LLM
from ..outputs import CompletionOutput, RequestOutput
from ..prompts import Prompt
from ..sampling.params import SamplingParams
from .beams import Beams, EarlyStopping, Rules, check_engine
from .search import spread


@dataclass(frozen=True)
class Hypothesis:
    """One text that a search found.

    completion  tokens, text, finish_reason ("stop" by an end-of-text or stop token, "length"; "timeout" and "abort"
                where the search was cut short); its cumulative_logprob is `logprob`
    logprob     sum of `token_logprobs`: log-probabilities (natural log) of the logits behind all processors
    objective   what its group maximised: logprob less the penalties for diversity; without groups the same
    score       objective / length ** length_penalty
    group       the group of beams that found it
    """

    completion: CompletionOutput
    logprob: float
    objective: float
    score: float
    group: int
    token_logprobs: Sequence[float]


@dataclass(frozen=True)
class BeamResult:
    """One prompt's result. hypotheses: best first, by logprob / length ** length_penalty; `output.outputs` has the same
    order. At most as many as beams: fewer where the allowed tokens allow fewer. error: why there is nothing.
    steps: tokens computed for each beam; pages_copied: by forks, all else is shared."""

    output: RequestOutput
    hypotheses: Sequence[Hypothesis]
    error: str | None
    steps: int
    pages_copied: int

    @property
    def chosen(self) -> list[CompletionOutput]:
        """The completions, best first."""
        return [one.completion for one in self.hypotheses]

    @property
    def best(self) -> CompletionOutput | None:
        return self.chosen[0] if self.hypotheses else None


@dataclass(frozen=True)
class BeamSearch:
    """The `beam_width` best texts of a beam search.

    All beams of a prompt are one batch in the ordinary steps of the engine, beside whatever else runs; their common
    text is in memory once. Each prompt takes beam_width of the engine's seats. Logits processors of the sampling
    parameters apply (penalties, masks, biases, min_tokens), and nothing is drawn: temperature 0 and 1 mean the same.

    beam_width      beams, and hypotheses that come back
    length_penalty  hypotheses compare by sum / length ** length_penalty; 0: by their sums; above 0 longer ones gain
    early_stopping  True: done when there are beam_width complete texts; False: when the best beam does not beat the
                    worst of these at its present length; "never": when it could not at any length
    """

    beam_width: int = 4
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False

    def __post_init__(self) -> None:
        whole_number("beam_width", self.beam_width)
        if isinstance(self.length_penalty, bool) or not abs(self.length_penalty) < float("inf"):
            raise ValueError(f"length_penalty={self.length_penalty!r} must be a finite number; 1 is the mean")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f'early_stopping={self.early_stopping!r} must be True, False or "never"')

    def beams(self) -> Beams:
        """What runs for one prompt."""
        return Beams(repr(self), self.beam_width, 1, 0.0, Rules(self.length_penalty, self.early_stopping))

    def prepare(self, params: SamplingParams) -> SamplingParams:
        """The parameters of the beams. ValueError for those that a search cannot work with."""
        wrong = {
            name: getattr(params, name)
            for name, neutral in NEUTRAL.items()
            if getattr(params, name) not in neutral
        }
        if params.n not in (1, self.beam_width):
            wrong["n"] = params.n
        if wrong:
            asked = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
            raise ValueError(
                f"sampling_params ask for {asked}, but {self!r} draws nothing, never pauses, ends its beams by "
                f"tokens or lengths and always returns their log-probabilities; leave out {', '.join(wrong)}"
            )
        return replace(params, n=self.beam_width, temperature=0.0)

    def generate(
        self, llm: LLM, prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *,
        priority: int | Sequence[int] | None = None, tenant: str | Sequence[str] | None = None,
        use_tqdm: bool | None = None,
    ) -> list[BeamResult]:  # fmt: skip
        """Search for all prompts at once; arguments, order and errors are those of `LLM.generate`.

        The first search of a width compiles its programs. ValueError where the LLM cannot fork texts.
        """
        check_engine(repr(self), self.beam_width, llm.engine.replicas[0])
        given, count, params = spread(self.prepare, prompts, sampling_params or SamplingParams())
        gangs = [self.beams() for _ in range(count)]
        outputs = llm.generate(
            given, params, priority=priority, tenant=tenant, gangs=gangs, use_tqdm=use_tqdm
        )
        return [_result(gang, output) for gang, output in zip(gangs, outputs)]


# Sampling parameters that have no meaning in a search by beams, and their neutral values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (0.0, 1.0), "top_p": (1.0,), "top_k": (0, -1), "min_p": (0.0,), "mirostat_mode": (0,),
    "stop": (None, ()), "structured_outputs": (None,), "repetition_detection": (None,), "segment_tokens": (None,),
    "logprobs": (None,),
}  # fmt: skip


def whole_number(name: str, value: Any) -> None:
    """ValueError unless it is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number, 1 or more")


def _result(beams: Beams, output: RequestOutput) -> BeamResult:
    hypotheses = [
        Hypothesis(
            one, text.logprob, text.objective, beams.rules.score(text.objective, max(1, len(text.tokens))), text.group,
            text.token_logprobs,
        )
        for one, text in zip(output.outputs, beams.texts)
    ]  # fmt: skip
    seedless = replace(output, seed=None)  # `LLM.resume` would go on without the search
    return BeamResult(seedless, hypotheses, output.error, beams.steps, beams.copied)
