"""LLM: what a notebook holds. A model, its tokenizer and an engine behind generate, chat and stream."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from ..attention.caches.paged import Pages
from ..attention.caches.policy import CachePolicy
from ..attention.forms import Form
from ..model import checkpoint
from ..model.config import ModelConfig
from ..model.stacked import unstack
from ..model.transforms.transform import Transform
from . import chat
from .bounds import Bounds
from .build import Build, open_model, open_tokenizer
from .describe import show
from .drafters.controller import Controller
from .drafters.draft import Drafter
from .finish import abort, finish
from .followers import lead_swap
from .gang import Gang
from .locks import FairLock
from .membership import calibrate, confirm, follow, guarded, meet, programs_of, refuse_requests, together
from .named_plan import plan_sizes
from .outputs import RequestOutput
from .policies.policy import Policy
from .prompts import Prompt, each, encode_prompt, is_prompt, need_tokenizer, salt_of
from .replicas import build_replicas, check_replicas
from .request import Request, Sample
from .sampling.cyclic_reflex import with_reflection_tokens
from .sampling.defaults import default_sampling_params
from .sampling.params import SamplingParams
from .stream import Stream
from .telemetry.engine import MeasuredEngine
from .telemetry.profile import trace
from .telemetry.recorder import Telemetry
from .tokenizer import Tokenizer
from .transformed import Transforms
from .weights import Weights, plan_swap


class LLM:
    """A language model ready to write.

    Args:
        model: a folder with a Hugging Face or Orbax checkpoint, a hub name, or "demo", the embedded model; or a
            config (`ModelConfig`, or a config.json's dict), whose weights are then drawn from `seed`.
        tokenizer: a `Tokenizer`, or the folder or hub name of one; None: the checkpoint's own (a config has none).
        dtype: dtype of the stored weights ("float32", "bfloat16"); None: what suits the device.
        max_model_len: longest prompt + output in tokens; None: the checkpoint's own limit.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: token budget of a step (decodes + prompt tokens).
        num_pages, page_size: the KV pool; None: chosen from the memory at hand and the back end.
        prefix_cache: prompts that begin with text that was computed before take it up from there; None: on
            where every part of the model allows it (`repr` says what turned it off).
        policy: who goes first (`serve.policies`); None: SarathiServe(), decodes and prompts share every step.
        seed: seeds requests that bring no seed of their own.
        strict: a compilation after warm-up is an error.
        max_output_tokens: tokens that any sample may generate at most; requests that ask for more get this many
            (finish_reason "length"), whatever their max_tokens, min_tokens or ignore_eos say. None: no such limit.
        max_waiting: sequences that may wait to start (a request brings n). Over it a request is refused with
            `QueueFull`, a ValueError; `generate` and `resume` hold their prompts back instead. None: no limit.
        telemetry: a file for a line a step: what was moved and computed, how near the device's ceilings that is,
            and what binds (`serve.telemetry`); a path or a `Telemetry`. None: nothing is measured.
        overlap: read each step while the device runs the next one; None: on. False reads every step at once, which
            is slower and generates the same.
        attention_backend: "blockwise" (plain JAX), "tpu" or "triton"; None: the kernels of the device, then plain JAX.
            Kernels for another device run interpreted, for tests.
        kv_cache_dtype: how keys and values are stored: "float32", "bfloat16", "float16", or quantised with a scale
            for each token and head, "int8" or "fp8"; None: as activations are. On CPU choose int8 or float16: XLA
            copies pages of bfloat16 and fp8 when it writes to them.
        tensor_parallel_size: devices that one model is split over: heads, MLP and vocabulary. With several processes
            (`tokenloom.initialize`) the devices of all of them count.
        sequence_parallel_size: devices (or groups of tensor_parallel_size) that each text is split over: every one
            keeps 1/n of all keys and values and computes 1/n of a prompt, for contexts longer than one holds.
        plan: the four sizes by a name, over all devices, as `tokenloom plan` calls plans: "tensor=8", "seq=2,tensor=4",
            "data=2,expert=4"; "auto": what the planner takes for this slice of TPUs, elsewhere the widest tensor plan.
            None: what the sizes say.
        decode_context_parallel_size: where tensor_parallel_size exceeds the model's KV heads, over how many of the
            devices that have one of them between them each page is split, token by token; None: all of them (where
            page_size divides by it); 1: each keeps a copy. No other number.
        enable_expert_parallel: mixtures keep their experts whole, 1/n of them on each of the tensor_parallel_size
            devices, rather than a part of every expert; all else is split as ever.
        data_parallel_size: replicas of the model in this process, each on devices of its own (replica r from number
            r * tensor_parallel_size * sequence_parallel_size on) with all weights, and with max_num_seqs,
            max_num_batched_tokens, num_pages, max_waiting, prefix cache and a copy of the policy for itself. They share
            the requests (`serve.replicas`); telemetry of the second is written to "run.1.jsonl" beside "run.jsonl".
        sequence_parallel_form: how prompt tokens meet keys on other devices (`attention.forms`): "ring",
            "token_ring", "gather" or "whole"; None: the quickest for each program, by a formula.
        overlap_tokens: steps of at least so many tokens of a model over several devices run in two halves, one of
            which computes while the other's results travel (TokenWeave); None: 1,024 on TPU and GPU; 0: never.
        cache: what attention layers remember (`attention.caches`): StreamingLLM, DoubleSparsity and others; None:
            every key and value in pages. `repr` says what a cache goes without.
        drafter: guesses tokens ahead, which the model then checks all at once (`serve.drafters`): DraftModel,
            TokenRecycling, CopySpec, SpecTr, RSDC, RSDS, DEL. None: one token at a time.
        controller: decides from load and acceptance how much is drafted, and when nothing is: SmartSpec. None: the
            drafter's most, in every step that carries no prompt.
        transforms: what changes the model before it runs (`model.transforms`): Int8(), Int4(), Fp8() and others, in
            order. `save` records them, and the saved checkpoint opens as it is.
        calibration: texts or lists of token ids that transforms look at, where they need any.
        compiled: a folder that `save_compiled` or `tokenloom compile` wrote, of programs for this model, these settings
            and this kind of device: nothing is compiled then. What does not suit is named, in a warning before it
            compiles after all, or with `strict` as an error. The folder holds code: name only one that you trust.
        skip_tokenizer_init: load no tokenizer; prompts are token ids then.
        progress: show progress bars (loading, compiling, generating).

    Raises ValueError, naming what is wrong and the remedy, for checkpoints and settings that cannot work.
    """

    def __init__(
        self, model: str | Path | ModelConfig | dict[str, Any] = "demo", *,
        tokenizer: Tokenizer | str | Path | None = None, dtype: str | None = None,
        max_model_len: int | None = None, max_num_seqs: int = 8, max_num_batched_tokens: int = 512,
        num_pages: int | None = None, page_size: int | None = None, seed: int = 0, strict: bool = False,
        progress: bool = True, skip_tokenizer_init: bool = False, prefix_cache: bool | None = None,
        policy: Policy | None = None, max_output_tokens: int | None = None, max_waiting: int | None = None,
        telemetry: str | Path | Telemetry | None = None, overlap: bool | None = None,
        attention_backend: str | None = None, kv_cache_dtype: str | None = None,
        tensor_parallel_size: int = 1, sequence_parallel_size: int = 1, data_parallel_size: int = 1,
        sequence_parallel_form: Form | None = None, decode_context_parallel_size: int | None = None,
        enable_expert_parallel: bool = False, plan: str | None = None,
        overlap_tokens: int | None = None, cache: CachePolicy | None = None,
        transforms: Sequence[Transform] = (), drafter: Drafter | None = None, controller: Controller | None = None,
        calibration: Sequence[str | Sequence[int]] | None = None,
        compiled: str | Path | None = None,
    ):  # fmt: skip
        sizes = dict(
            tensor_parallel_size=tensor_parallel_size, sequence_parallel_size=sequence_parallel_size,
            data_parallel_size=data_parallel_size, enable_expert_parallel=enable_expert_parallel,
        )  # fmt: skip
        sizes = plan_sizes(
            plan, model, sizes, dtype=dtype, max_model_len=max_model_len, max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens, kv_cache_dtype=kv_cache_dtype,
        )  # fmt: skip
        build = Build(
            max_model_len=max_model_len, max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens, num_pages=num_pages, page_size=page_size, seed=seed,
            strict=strict, prefix_cache=prefix_cache, policy=policy, telemetry=Telemetry.of(telemetry),
            overlap=overlap, attention_backend=attention_backend, kv_cache_dtype=kv_cache_dtype,
            sequence_parallel_form=sequence_parallel_form, decode_context_parallel_size=decode_context_parallel_size,
            overlap_tokens=overlap_tokens, **sizes,
            bounds=Bounds(max_output_tokens, max_waiting), cache=Pages() if cache is None else cache, drafter=drafter,
            controller=controller, compiled=compiled,
        )  # fmt: skip
        check_replicas(build)
        self.group = meet(build, dtype=dtype, transforms=tuple(transforms))
        progress = progress and (self.group is None or self.group.leads)
        with together(self.group):
            opened = open_model(model, dtype, build)
            self.name, self.folder, self.seed, self.progress = opened.name, opened.folder, seed, progress
            self.tokenizer = None if skip_tokenizer_init else open_tokenizer(tokenizer, opened.folder)
            self.defaults = default_sampling_params(opened.folder)
            opened, self.transforms = Transforms.of(opened).apply(
                opened, transforms, calibration, self.tokenizer, build
            )
            build = confirm(self.group, build, opened, self.tokenizer)
            self.config, self.engine = build_replicas(opened, self.tokenizer, build, programs_of(self.group))
            for one in self.engine.replicas:
                one.programs.compile(progress)
                calibrate(self.group, one)
        self.telemetry, self.cache = build.telemetry, build.cache
        for one in self.engine.replicas:
            if isinstance(one, MeasuredEngine):
                one.telemetry.start(self.name, self.config, one)
        self._lock = FairLock()
        self._requests = 0
        self._live: weakref.WeakSet[Request] = weakref.WeakSet()
        self._closed = False

    @classmethod
    def from_config(cls, config: ModelConfig | dict[str, Any], seed: int = 0, **options: Any) -> Self:
        """A model with random weights drawn from `seed`: `config` is a ModelConfig or a config.json's dict, `options`
        are those of `LLM`."""
        return cls(config, seed=seed, **options)

    # -- what people call ----------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
        tenant: str | Sequence[str] | None = None,
        until: Sequence[Callable[[list[Sample]], bool]] | None = None,
        gangs: Sequence[Gang | None] | None = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts; results come in the order of the prompts. sampling_params None: the checkpoint's own.

        A prompt is a string, a list of token ids, or {"prompt": ...} / {"prompt_token_ids": ...}, which may hold
        a "cache_salt" too: prompts share cached prefixes with those of the same salt only. In a list, a prompt
        that cannot run gets an output with `error` set and the others finish; alone it raises.

        priority (lower goes first) and tenant, one for all or one a prompt, matter to the policies `Priority` and
        `Fair`.

        until, one a prompt: a function that is told of the prompt's samples that ended in a step (`serve.request`,
        in order of their indices); when it returns True the prompt's other samples end at once, with finish_reason
        "abort". `serve.search` has searches made of it. gangs, one a prompt or None: its samples run in
        lock-step, as the beams of a search do (`serve.gang`).
        """
        if not isinstance(prompts, Iterable):
            raise ValueError(f"prompts is a {type(prompts).__name__}; give a prompt or a list of prompts")
        given: Any = prompts if isinstance(prompts, str | bytes | dict) else list(prompts)
        alone = is_prompt(given)
        items: list[Any] = [given] if alone else given
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or self.defaults] * len(items)
        else:
            params = list(sampling_params)
        if len(params) != len(items):
            raise ValueError(
                f"{len(items)} prompts came with {len(params)} SamplingParams; give one for all or one each"
            )
        ranks = each(priority, 0, len(items), "priority", int)
        tenants = each(tenant, None, len(items), "tenant", str)
        if until is not None and len(until) != len(items):
            raise ValueError(f"{len(items)} prompts came with {len(until)} functions `until`; give one each")
        requests: list[Request] = []
        for item, one, rank, owner in zip(items, params, ranks, tenants):
            try:
                requests.append(self._request(item, one, rank, owner))
            except ValueError as error:
                if alone or self._closed:
                    raise
                requests.append(_refused(len(requests), item, one, str(error)))
        for request, judge in zip(requests, until or ()):
            request.until = judge
        for request, gang in zip(requests, gangs or ()):
            request.gang = gang
        return self._run(requests, alone, use_tqdm)

    def resume(
        self,
        outputs: RequestOutput | Mapping[str, Any] | Sequence[RequestOutput | Mapping[str, Any]],
        *,
        segment_tokens: int | None = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue generations that were stopped before their end ("segment", "timeout", "abort").

        outputs: RequestOutputs or their snapshots, made by this LLM or by another of the same model, in any
        process; those that are complete come back as they are. segment_tokens: the next quota; None: to the
        end. The results cover the whole generations, and with the same weights they are what one uninterrupted
        run gives. A timeout_s counts anew, and metrics are those of the last segment. What was there before is
        recomputed, or found in the prefix cache. ValueError when an output cannot be of this model; in a list,
        an output that cannot go on comes back with `error` set.
        """
        if not self.cache.abilities.rebuildable:
            raise ValueError(
                f"cache={self.cache!r} gives a prompt and a generation different states, so resuming would not "
                f"continue what was begun; generate anew, or use an LLM with cache=None"
            )
        alone = isinstance(outputs, RequestOutput | Mapping)
        if not isinstance(outputs, RequestOutput | Iterable):
            raise ValueError(f"outputs is a {type(outputs).__name__}; give RequestOutputs or their snapshots")
        items: list[Any] = [outputs] if alone else list(outputs)  # type: ignore[list-item]
        whole = [one if isinstance(one, RequestOutput) else RequestOutput.from_snapshot(one) for one in items]
        places = [place for place, one in enumerate(whole) if one.resumable]
        requests = [Request.resuming(whole[place], segment_tokens) for place in places]
        with self._lock:
            self._live.update(requests)
        for place, output in zip(places, self._run(requests, alone, use_tqdm)):
            whole[place] = output
        return whole

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

    def get_default_sampling_params(self) -> SamplingParams:
        """What requests without SamplingParams get: what the checkpoint's generation_config.json says, else
        `SamplingParams()`. The server and batch jobs begin with it too, but their length limits are OpenAI's."""
        return self.defaults

    def chat_prompt(self, messages: Sequence[dict[str, Any]], **settings: Any) -> dict[str, Any]:
        """The prompt that `chat` would send: its text and its token ids, with one BOS at most."""
        tokenizer = need_tokenizer(self.tokenizer, "chat")
        template = settings.pop("chat_template", None)
        text = chat.apply(tokenizer, list(messages), template=template, **settings)
        return {"prompt": text, "prompt_token_ids": chat.encode_chat(tokenizer, text)}

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Stream:
        """Text as it is written: iterate with `for` or `async for`; `.output` is the RequestOutput so far."""
        need_tokenizer(self.tokenizer, "stream")
        params = sampling_params or self.defaults
        if params.n != 1:
            raise ValueError(f"stream writes one text, but n={params.n}; use generate, or n=1")
        return Stream(self, self._submit(prompt, params))

    def abort(self, request_id: str | None = None) -> int:
        """End a request now, from any thread (None: all of them); returns how many were running or waiting.

        Their outputs keep what was generated, with finish_reason "abort". An id that is not known (any more) is
        nothing to end.
        """
        with self._lock:
            found = [
                request
                for request in self._live
                if not request.finished and request_id in (None, request.request_id)
            ]
            self._abort(found)
        return len(found)

    # -- the weights ---------------------------------------------------------------------------------------

    @property
    def weight_version(self) -> int:
        """How often the weights were swapped, or the number that the last swap gave them."""
        return self.engine.weight_version

    def update_weights(self, source: Weights, *, version: int | None = None) -> None:
        """Go on with other weights of the same model: nothing is compiled, and each old array is freed when its
        successor is there.

        source: an NNX module (`model.decoder.Decoder`, as `adapt` trains it), its state or pure dict of
        parameters, or a checkpoint's folder, which is read array by array. Arrays are copied, and quantised anew
        where this model was quantised. It happens between
        two steps, and any thread may call it while another generates: running requests keep their tokens, and
        what the old weights computed for them is recomputed with the new ones. version: the new
        `weight_version` (a training step, say), above the present one; None: the next. ValueError, and nothing
        changed, when a parameter is missing, unknown or misshapen.
        """
        with self._lock:
            self._check_open()
            engine, present = self.engine, self.engine.weight_version
            number = present + 1 if version is None else version
            if isinstance(number, bool) or not isinstance(number, int) or number <= present:
                raise ValueError(
                    f"version={version!r} must be a whole number above the present {present}: within a "
                    "generation, versions never fall"
                )
            positions = self.cache.longest(engine.max_model_len)
            swaps = [plan_swap(one.programs, self.config, positions, source) for one in engine.replicas]
            with guarded(self.group):
                for one, swap in zip(engine.replicas, swaps):
                    one.swap_weights(
                        swap if self.group is None else lead_swap(self.group, source, swap), number
                    )

    # -- the life of the engine ----------------------------------------------------------------------------

    def follow(self) -> bool:
        """Where several processes run one model (`tokenloom.initialize`): in all but process 0, take part in what it
        computes until it closes, then return True. False at once in process 0, and where there is one process only,
        so the same script runs everywhere: `if not llm.follow(): llm.generate(...)`.

        RuntimeError (`ProcessLost`) that names the process, when one ends or falls silent.
        """
        try:
            positions = self.cache.longest(self.engine.max_model_len)
            return follow(self.group, self.engine.replicas[0], self.config, positions)
        finally:
            self._closed |= self.group is not None and not self.group.leads

    def close(self) -> None:
        """Free the device memory; the object cannot be used afterwards."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for one in self.engine.replicas:
                    if isinstance(one, MeasuredEngine):
                        one.telemetry.close()
                    one.programs.close()

    @contextmanager
    def profile(self, path: str | Path) -> Iterator[None]:
        """Trace what runs inside into the folder `path`, for TensorBoard or Perfetto: `with llm.profile("trace"):`.

        Programs and their operations carry the names of their steps (decode_B8_..., layer3/mixer/attend, head_8),
        and each dispatch stands in the host's timeline under its kind. ValueError where tracing cannot work.
        """
        with trace(path):
            yield

    def reset_prefix_cache(self) -> None:
        """Forget what was computed before; running requests go on."""
        with self._lock:
            for one in self.engine.replicas:
                one.pages.new_weights()

    def save(self, path: str | Path) -> None:
        """Write an Orbax checkpoint (weights, config, tokenizer files) that `LLM(path)` opens again.

        ValueError when the folder exists already, and where several processes share the model.
        """
        if self.group is not None:
            raise ValueError("several processes share this model; open it in one process to save it")
        programs = self.engine.replicas[0].programs
        params = programs.params if programs.period is None else unstack(programs.params, programs.period)
        metadata = self.transforms.metadata()
        checkpoint.save_orbax(path, params, self.config, metadata=metadata, tokenizer_from=self.folder)

    def save_compiled(self, path: str | Path) -> None:
        """Write the engine's programs, without weights, to a new folder: `LLM(model, compiled=path)` with the same
        settings then compiles nothing. They serve the same versions and the same kind of device only. All are compiled
        anew for it (what JAX's cache gave cannot be written); `tokenloom compile` does that alone.

        ValueError when the folder exists already, and where several processes share the model.
        """
        self._check_open()
        if self.group is not None:
            raise ValueError("several processes share this model; write the programs of one process's engine")
        self.engine.replicas[0].programs.save(path, self.progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._closed:
            return f"LLM({self.name!r}, closed)"
        return show(self.name, self.config, self.cache, self.engine.replicas)

    # -- inside --------------------------------------------------------------------------------------------

    def _submit(self, prompt: Prompt, params: SamplingParams) -> Request:
        """Queue one prompt; ValueError when it can never run, `QueueFull` when it can later."""
        request = self._request(prompt, params)
        with self._lock:
            self.engine.add(request)
        return request

    def _request(
        self, prompt: Prompt, params: SamplingParams, priority: int = 0, tenant: str | None = None
    ) -> Request:
        text, ids = self.tokens(prompt)
        return self._new_request(text, ids, params, salt_of(prompt), priority, tenant)

    def enqueue(
        self, text: str | None, ids: list[int], params: SamplingParams, *, cache_salt: str | None = None,
        priority: int = 0, tenant: str | None = None,
    ) -> Request:  # fmt: skip
        """Queue one tokenized prompt; ValueError when it can never run, `QueueFull` when it can later. Someone
        has to step the engine."""
        with self._lock:
            request = self._new_request(text, ids, params, cache_salt, priority, tenant)
            self.engine.add(request)
        return request

    def _new_request(
        self, text: str | None, ids: list[int], params: SamplingParams, salt: str | None,
        priority: int = 0, tenant: str | None = None,
    ) -> Request:  # fmt: skip
        """A request with its place in the order of requests, and so its seed; not queued yet."""
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params={params!r} is a {type(params).__name__}; give SamplingParams")
        with self._lock:
            self._check_open()
            params = with_reflection_tokens(params, self.tokenizer)
            index, self._requests = self._requests, self._requests + 1
            seed = params.seed if params.seed is not None else _derive_seed(self.seed, index)
            request = Request(
                str(index), text, ids, params, seed, cache_salt=salt, priority=priority, tenant=tenant
            )
            self._live.add(request)
        return request

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"LLM({self.name!r}) is closed; make a new one")
        refuse_requests(self.group)

    def tokens(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """A prompt's text (None when it came as token ids) and token ids; safe to call from any thread."""
        return encode_prompt(prompt, self.tokenizer)

    def _run(self, requests: list[Request], alone: bool, use_tqdm: bool | None) -> list[RequestOutput]:
        """Drive until all are done, and return the outputs in order."""
        refuse_requests(self.group)
        show = (self.progress and len(requests) > 1) if use_tqdm is None else use_tqdm
        finish(self.engine, self._lock, requests, alone=alone, show=show)
        return [request.output() for request in requests]

    def _abort(self, requests: list[Request]) -> None:
        abort(self.engine, self._lock, requests)


def _derive_seed(seed: int, index: int) -> int:
    return random.Random(f"{seed}:{index}").getrandbits(64)


def _refused(index: int, prompt: Any, params: SamplingParams, reason: str) -> Request:
    text = prompt if isinstance(prompt, str) else None
    return Request(f"refused-{index}", text, [], params, 0, error=reason)
