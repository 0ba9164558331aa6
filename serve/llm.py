"""LLM: what a notebook holds. A model, its tokenizer and an engine behind generate, chat and stream."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
from tqdm.auto import tqdm

from ..model import checkpoint
from ..model.config import ModelConfig
from ..model.layers import Numerics
from ..model.stacked import unstack
from . import chat
from .build import Build, build_engine, choose_numerics
from .interrupt import deferred_interrupt
from .locks import FairLock
from .outputs import RequestOutput
from .request import Request
from .sampling.params import SamplingParams
from .tokenizer import Tokenizer

Prompt = str | Sequence[int] | dict[str, Any]


class LLM:
    """A language model ready to write.

    Args:
        model: a folder with a Hugging Face or Orbax checkpoint, a hub name, or "demo", the embedded model.
        dtype: dtype of the stored weights ("float32", "bfloat16"); None: what suits the device.
        max_model_len: longest prompt + output in tokens; None: the checkpoint's own limit.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: token budget of a step (decodes + prompt tokens).
        num_pages, page_size: the KV pool; None: chosen from the memory at hand and the back end.
        seed: seeds requests that bring no seed of their own.
        strict: a compilation after warm-up is an error.
        skip_tokenizer_init: load no tokenizer; prompts are token ids then.
        progress: show progress bars (loading, compiling, generating).

    Raises ValueError, naming what is wrong and the remedy, for checkpoints and settings that cannot work.
    """

    def __init__(
        self, model: str | Path = "demo", *, dtype: str | None = None, max_model_len: int | None = None,
        max_num_seqs: int = 8, max_num_batched_tokens: int = 512, num_pages: int | None = None,
        page_size: int | None = None, seed: int = 0, strict: bool = False, progress: bool = True,
        skip_tokenizer_init: bool = False,
    ):  # fmt: skip
        folder = checkpoint.resolve(model)
        config = checkpoint.load_config(folder)[1]
        tokenizer = None if skip_tokenizer_init else Tokenizer.load(folder)
        numerics = choose_numerics(dtype, config.dtype)
        params = checkpoint.load(folder, config, numerics)
        self.folder: Path | None = folder
        build = Build(max_model_len, max_num_seqs, max_num_batched_tokens, num_pages, page_size, seed, strict)
        self._start(str(model), config, numerics, params, tokenizer, build, progress)

    @classmethod
    def from_config(
        cls, config: ModelConfig | dict[str, Any], seed: int = 0, *, dtype: str | None = None,
        tokenizer: Tokenizer | None = None, max_model_len: int | None = None, max_num_seqs: int = 8,
        max_num_batched_tokens: int = 512, num_pages: int | None = None, page_size: int | None = None,
        strict: bool = False, progress: bool = True,
    ) -> Self:  # fmt: skip
        """A model with random weights drawn from `seed`: `config` is a ModelConfig or a config.json's dict."""
        if isinstance(config, dict):
            config = checkpoint.read_config(config)
        numerics = choose_numerics(dtype, config.dtype)
        self = cls.__new__(cls)
        self.folder = None
        build = Build(max_model_len, max_num_seqs, max_num_batched_tokens, num_pages, page_size, seed, strict)
        params = checkpoint.random_params(config, numerics, seed)
        self._start(f"{config.model_type} (random)", config, numerics, params, tokenizer, build, progress)
        return self

    def _start(
        self, name: str, config: ModelConfig, numerics: Numerics, params: Any, tokenizer: Tokenizer | None,
        build: Build, progress: bool,
    ) -> None:  # fmt: skip
        self.name, self.tokenizer, self.seed, self.progress = name, tokenizer, build.seed, progress
        self.config, self.engine = build_engine(config, numerics, params, tokenizer, build)
        self.engine.programs.compile(progress)
        self._lock = FairLock()
        self._requests = 0
        self._closed = False

    # -- what people call ----------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts; results come in the order of the prompts.

        A prompt is a string, a list of token ids, or {"prompt": ...} / {"prompt_token_ids": ...}. In a list, a
        prompt that cannot run gets an output with `error` set and the others finish; alone it raises.
        """
        alone = _is_prompt(prompts)
        items: list[Any] = [prompts] if alone else list(prompts)  # type: ignore[list-item]
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(items)
        else:
            params = list(sampling_params)
        if len(params) != len(items):
            raise ValueError(
                f"{len(items)} prompts came with {len(params)} SamplingParams; give one for all or one each"
            )
        return self._run(items, params, alone, use_tqdm)

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: list[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation (a list of messages), or several (a list of lists).

        tools, chat_template, add_generation_prompt (None: unless the final message is continued),
        continue_final_message and chat_template_kwargs mean what they mean to transformers' chat templates.
        """
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        alone = not messages or isinstance(messages[0], dict)
        conversations: list[Any] = [messages] if alone else list(messages)
        prompts = [
            self.chat_prompt(
                conversation, tools=tools, chat_template=chat_template,
                add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]  # fmt: skip
        return self.generate(prompts[0] if alone else prompts, sampling_params, use_tqdm=use_tqdm)

    def chat_prompt(self, messages: Sequence[dict[str, Any]], **settings: Any) -> dict[str, Any]:
        """The prompt that `chat` would send: its text and its token ids, with one BOS at most."""
        tokenizer = self._need_tokenizer("chat")
        template = settings.pop("chat_template", None)
        text = chat.apply(tokenizer, list(messages), template=template, **settings)
        return {"prompt": text, "prompt_token_ids": chat.encode_chat(tokenizer, text)}

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Stream:
        """Text as it is written: iterate with `for` or `async for`; `.output` is the RequestOutput so far."""
        self._need_tokenizer("stream")
        params = sampling_params or SamplingParams()
        if params.n != 1:
            raise ValueError(f"stream writes one text, but n={params.n}; use generate, or n=1")
        return Stream(self, self._submit(prompt, params))

    # -- the life of the engine ----------------------------------------------------------------------------

    def close(self) -> None:
        """Free the device memory; the object cannot be used afterwards."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.engine.programs.close()

    def save(self, path: str | Path) -> None:
        """Write an Orbax checkpoint (weights, config, tokenizer files) that `LLM(path)` opens again.

        ValueError when the folder exists already.
        """
        programs = self.engine.programs
        params = programs.params if programs.period is None else unstack(programs.params, programs.period)
        checkpoint.save_orbax(path, params, self.config, tokenizer_from=self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._closed:
            return f"LLM({self.name!r}, closed)"
        weights = jax.tree.leaves(self.engine.programs.params)
        count = sum(leaf.size for leaf in weights)
        size = sum(leaf.nbytes for leaf in weights) / 1e6
        pages = self.engine.pages
        return (
            f"LLM({self.name!r}: {self.config.model_type}, {count / 1e6:.1f}M parameters, {size:.0f} MB "
            f"{weights[0].dtype} on {weights[0].device}; max_model_len {self.engine.max_model_len}; "
            f"{pages.num_pages - 1} pages of {pages.page_size} tokens; {self.engine.programs.plan})"
        )

    # -- inside --------------------------------------------------------------------------------------------

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"{what} works on text, but this LLM has no tokenizer; pass token ids to generate"
            )
        return self.tokenizer

    def _submit(self, prompt: Prompt, params: SamplingParams) -> Request:
        """Queue one prompt; ValueError when it can never run."""
        return self.enqueue(*self.tokens(prompt), params)

    def enqueue(self, text: str | None, ids: list[int], params: SamplingParams) -> Request:
        """Queue one tokenized prompt; ValueError when it can never run. Someone has to step the engine."""
        with self._lock:
            if self._closed:
                raise ValueError(f"LLM({self.name!r}) is closed; make a new one")
            index, self._requests = self._requests, self._requests + 1
            seed = params.seed if params.seed is not None else _derive_seed(self.seed, index)
            request = Request(str(index), text, ids, params, seed)
            self.engine.add(request)
        return request

    def tokens(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """A prompt's text (None when it came as token ids) and token ids; safe to call from any thread."""
        if isinstance(prompt, dict):
            unknown = set(prompt) - {"prompt", "prompt_token_ids"}
            if unknown or not prompt:
                raise ValueError(
                    f"a prompt dict holds 'prompt' (text) or 'prompt_token_ids'; got keys {sorted(prompt)}"
                )
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), self.tokens(prompt["prompt_token_ids"])[1]
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            return prompt, self._need_tokenizer("a text prompt").encode(prompt)
        ids: list[Any] = list(prompt)
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise ValueError(f"a prompt is a string or a list of token ids (int); got {str(ids)[:80]}")
        return None, ids

    def _run(
        self, prompts: list[Any], params: list[SamplingParams], alone: bool, use_tqdm: bool | None
    ) -> list[RequestOutput]:
        """Submit, drive until all are done, and return the outputs in order. An interrupt ends the requests."""
        requests: list[Request] = []
        show = (self.progress and len(prompts) > 1) if use_tqdm is None else use_tqdm
        try:
            for prompt, one in zip(prompts, params):
                try:
                    requests.append(self._submit(prompt, one))
                except ValueError as error:
                    if alone or self._closed:
                        raise
                    requests.append(_refused(len(requests), prompt, one, str(error)))
            with deferred_interrupt() as interrupted, tqdm(
                total=len(requests), desc="generating", unit="prompt", disable=not show
            ) as bar:  # fmt: skip
                # Another thread's step may finish our requests, so the end is read from the requests.
                waiting, mine = deque(requests), {id(request) for request in requests}
                while waiting:
                    while waiting and waiting[0].finished:
                        waiting.popleft()
                    if not waiting:
                        break
                    with self._lock:
                        done = {id(s.request) for s in self.engine.step() if s.request.finished}
                    bar.update(len(done & mine))
                    if interrupted():
                        raise KeyboardInterrupt
        except BaseException:
            self._abort(requests)
            raise
        return [request.output() for request in requests]

    def _abort(self, requests: list[Request]) -> None:
        with self._lock:
            for request in requests:
                self.engine.abort(request)


class Stream:
    """An iterator and an async iterator over pieces of one generation's text."""

    def __init__(self, llm: LLM, request: Request):
        self._llm, self._request, self._shown = llm, request, 0

    @property
    def output(self) -> RequestOutput:
        return self._request.output()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        sample = self._request.samples[0]
        with deferred_interrupt() as interrupted:
            while True:
                with self._llm._lock:
                    done = sample.finish_reason is not None
                    piece = sample.text[self._shown :]
                    if piece or done:
                        break
                    self._llm.engine.step()
                if interrupted():
                    self.close()
                    raise KeyboardInterrupt
        if not piece:
            raise StopIteration
        self._shown += len(piece)
        return piece

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        piece = await asyncio.to_thread(next, self, None)
        if piece is None:
            raise StopAsyncIteration
        return piece

    def close(self) -> None:
        """Stop generating."""
        if not self._llm._closed:
            self._llm._abort([self._request])

    def __del__(self) -> None:
        self.close()


def _is_prompt(prompts: Any) -> bool:
    """True for one prompt: a string, a dict, or a flat list of token ids."""
    if isinstance(prompts, (str, dict)):
        return True
    return bool(prompts) and all(isinstance(item, int) for item in prompts)


def _derive_seed(seed: int, index: int) -> int:
    return random.Random(f"{seed}:{index}").getrandbits(64)


def _refused(index: int, prompt: Any, params: SamplingParams, reason: str) -> Request:
    text = prompt if isinstance(prompt, str) else None
    return Request(f"refused-{index}", text, [], params, 0, error=reason)
