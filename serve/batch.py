"""Batch jobs: OpenAI's batch format in, results out, and a job that can be killed at any moment and goes on.

Results do not depend on interruptions: a request without a seed gets one from the job's seed and its custom_id,
and a result is appended whole, and synced, before it counts as done.
"""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from tqdm.auto import tqdm

from .batch_files import BatchStopped, Line, ResultFile, digest, parse_line, read_lines
from .bounds import QueueFull
from .driver import Driver, Update
from .openai import Call, Refusal, error_object, error_status, parse, served_names
from .openai_answers import response
from .outputs import RequestOutput

if TYPE_CHECKING:
    from .llm import LLM

POLL_SECONDS = 0.1
RETRY_SECONDS = 0.01
SAMPLED_BYTES = 1 << 16


@dataclass
class BatchSummary:
    """What a run did. lines: requests of this shard in the input; earlier: done by runs before, of them
    failed_earlier with an error; completed and failed: answered now, with a result or an error; tokens and seconds
    of this run."""

    lines: int = 0
    earlier: int = 0
    completed: int = 0
    failed: int = 0
    failed_earlier: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = self.completion_tokens / self.seconds if self.seconds else 0.0
        return (
            f"{self.completed} completed, {self.failed} failed, {self.earlier} done before, of {self.lines} "
            f"requests; {self.completion_tokens} tokens in {self.seconds:.1f} s ({rate:.1f} tokens/s)"
        )


def run_batch(
    llm: LLM, input_path: str | Path, output_path: str | Path, *, seed: int = 0, shard: tuple[int, int] = (0, 1),
    served_model_names: Sequence[str] = (), progress: bool | None = None, flush_seconds: float = 0.5,
) -> BatchSummary:  # fmt: skip
    """Answer every request of a JSONL file; run again after an interruption, it goes on where it was.

    Input: OpenAI's batch format, {"custom_id", "method": "POST", "url": "/v1/completions" or
    "/v1/chat/completions", "body"} a line. Output: {"id", "custom_id", "response": {"status_code", "request_id",
    "body"}, "error"} a line, in the order in which requests finish; a line that cannot be served gets an error
    and the job goes on. OUTPUT.job keeps the settings.

    seed: with the custom_id it seeds the requests that bring no seed. shard: (i, n): answer only the lines whose
    custom_id hashes to i modulo n; each of n processes takes one i and an output of its own. served_model_names:
    what a body's "model" may be; default: the name that the model was opened by. progress: a bar with the time
    that is left and tokens/s; None: as the LLM shows progress. flush_seconds: a result is on disk so soon.

    Raises ValueError when the settings or the answered input lines differ from those of the output's earlier
    runs, BatchStopped when results cannot be written or the engine failed. SIGINT and SIGTERM (in the main
    thread) write what is complete, then raise KeyboardInterrupt or SystemExit(143).
    """
    source, target = Path(input_path), Path(output_path)
    if not source.is_file():
        raise ValueError(f"the input {source} is not a file; give a JSONL file with a request a line")
    if target.exists() and target.samefile(source):
        raise ValueError(f"input and output are the same file, {source}; name another output")
    part, parts = shard
    if not 0 <= part < parts:
        raise ValueError(f"shard {part}/{parts} does not exist; give i/n with 0 <= i < n")
    names = served_names(llm, served_model_names)
    settings = _settings(llm, names, seed, shard)
    show = llm.progress if progress is None else progress
    with noted_signals() as signalled, ResultFile(target, settings, flush_seconds=flush_seconds) as results:
        job = _Job(llm, source, results, names, seed, shard, signalled)
        total = job.survey()
        with tqdm(
            total=total, initial=len(results.done), desc="batch", unit="request", disable=not show
        ) as bar:
            with Driver(llm) as driver:
                job.run(driver, bar)
            job.drain(driver)
    if signalled() == signal.SIGINT:
        raise KeyboardInterrupt
    if signalled():
        raise SystemExit(128 + signalled())
    return job.summary


@dataclass(eq=False)
class _Open:
    """A request that runs: the outputs of its prompts as far as they are there."""

    line: Line
    call: Call
    outputs: list[RequestOutput | None]
    closed: bool = False


class _Job:
    """One run over the input. Everything here happens in the caller's thread; the driver only fills `arrived`."""

    def __init__(
        self, llm: LLM, source: Path, results: ResultFile, names: Sequence[str], seed: int,
        shard: tuple[int, int], stopped: Callable[[], int],
    ):  # fmt: skip
        self.llm, self.source, self.results, self.names, self.seed = llm, source, results, names, seed
        self.shard, self.stopped = shard, stopped
        self.salt = digest(repr(sorted(results.settings.items()))).to_bytes(16, "big")
        self.arrived: queue.SimpleQueue[tuple[_Open, int, Update]] = queue.SimpleQueue()
        self.running = 0  # generations that were handed to the driver and are not back
        replicas, most = llm.engine.replicas, llm.engine.bounds.max_waiting
        wanted = 3 * sum(one.programs.plan.max_num_seqs for one in replicas) + 8
        self.ahead = wanted if most is None else min(wanted, most * len(replicas))
        self.summary = BatchSummary(earlier=len(results.done), failed_earlier=results.failed)

    # -- the input -----------------------------------------------------------------------------------------

    def lines(self) -> Iterator[Line]:
        """This shard's lines. A custom_id that came before makes its line an error under an id of its own."""
        seen: set[int] = set()
        part, parts = self.shard
        for number, raw in read_lines(self.source):
            line = parse_line(number, raw, self.salt)
            name = digest(line.custom_id)
            if name % parts != part:
                continue
            if name in seen:
                line = _duplicate(line)
                name = digest(line.custom_id)
            seen.add(name)
            yield line

    def survey(self) -> int:
        """The number of requests (estimated for a new job of several shards); ValueError when a line that was
        answered before reads differently now."""
        if not self.results.done:
            return -(-sum(1 for _ in read_lines(self.source)) // self.shard[1])
        count = 0
        for line in self.lines():
            count += 1
            before = self.results.done.get(digest(line.custom_id), line.key)
            if before != line.key:
                raise ValueError(
                    f"line {line.number} of {self.source} (custom_id {line.custom_id!r}) was answered before, but "
                    f"reads differently now; give it a new custom_id, or name another output"
                )
        return count

    # -- the work ------------------------------------------------------------------------------------------

    def run(self, driver: Driver, bar: tqdm) -> None:
        """Keep `ahead` generations with the driver until the input ends or a signal comes."""
        started, lines, more = time.monotonic(), self.lines(), True
        while (more or self.running) and not self.stopped():
            while more and self.running < self.ahead and not self.stopped():
                line = next(lines, None)
                more = line is not None
                if line is not None:
                    self.start(line, driver)
            finished = self.drain(driver, POLL_SECONDS if self.running else 0.0)
            self.results.flush_due()
            self.summary.seconds = time.monotonic() - started
            if finished:
                rate = self.summary.completion_tokens / max(self.summary.seconds, 1e-9)
                bar.set_postfix_str(f"{rate:.1f} tokens/s", refresh=False)
                bar.update(self.summary.completed + self.summary.failed + self.summary.earlier - bar.n)
        if not more:
            bar.total = self.summary.lines
            bar.refresh()

    def start(self, line: Line, driver: Driver) -> None:
        """Hand a request to the driver, unless it was answered before or cannot be served."""
        self.summary.lines += 1
        if digest(line.custom_id) in self.results.done:
            return
        try:
            if line.error is not None:
                raise line.error
            call = parse(line.url, line.body, self.llm, self.names)
            if call.stream:
                raise Refusal("stream=true has no meaning in a batch job; leave it out", param="stream")
        except ValueError as error:
            self.fail(line, error)
            return
        work = _Open(line, call, [None] * len(call.prompts))
        for place in range(len(call.prompts)):
            self.running += call.params.n
            self.submit(work, place, driver)

    def submit(self, work: _Open, place: int, driver: Driver) -> None:
        """Hand one prompt to the driver. A full queue (others may use the LLM too) is tried again."""
        params, prompt = work.call.params, work.call.prompts[place]
        if params.seed is None:
            params = replace(params, seed=request_seed(self.seed, work.line.custom_id, place))

        def arrive(update: Update) -> None:
            self.arrived.put((work, place, update))

        try:
            driver.submit(prompt, params, arrive, every_step=False)
        except RuntimeError as error:
            raise _broken(error) from error

    def drain(self, driver: Driver, wait: float = 0.0) -> int:
        """Take what has finished, waiting `wait` seconds for the first; returns how many prompts came back."""
        count = 0
        while True:
            try:
                work, place, update = self.arrived.get(block=wait > 0 and not count, timeout=wait or None)
            except queue.Empty:
                return count
            if isinstance(update.error, QueueFull) and not self.stopped():
                time.sleep(RETRY_SECONDS)
                self.submit(work, place, driver)
                continue
            count += 1
            self.running -= work.call.params.n
            self.take(work, place, update)

    def take(self, work: _Open, place: int, update: Update) -> None:
        """One prompt of a request is back; the request is done when all are, or when one was refused."""
        if isinstance(update.error, QueueFull):
            return  # the job stops: the next run answers it
        if not isinstance(update.error, ValueError | None):
            raise _broken(update.error) from update.error
        if work.closed or (update.output is not None and _aborted(update.output)):
            return
        if update.error is not None:
            work.closed = True
            self.fail(work.line, update.error)
            return
        work.outputs[place] = update.output
        outputs = [output for output in work.outputs if output is not None]
        if len(outputs) == len(work.outputs):
            work.closed = True
            body = response(work.call, work.line.key, int(time.time()), outputs)
            self.summary.completed += 1
            self.summary.prompt_tokens += body["usage"]["prompt_tokens"]
            self.summary.completion_tokens += body["usage"]["completion_tokens"]
            self.write(work.line, 200, body, None)

    def fail(self, line: Line, error: ValueError) -> None:
        self.summary.failed += 1
        problem = error_object(error)
        short = {"code": problem["code"] or problem["type"], "message": problem["message"]}
        self.write(line, error_status(error), {"error": problem}, short)

    def write(self, line: Line, status: int, body: dict[str, Any], error: dict[str, Any] | None) -> None:
        answer = {"status_code": status, "request_id": line.key, "body": body}
        self.results.append(
            {"id": f"batch_req_{line.key}", "custom_id": line.custom_id, "response": answer, "error": error}
        )


def _broken(error: Exception) -> BatchStopped:
    return BatchStopped(
        f"the engine stopped ({error}); the results before are kept: run the same command to go on"
    )


def request_seed(seed: int, custom_id: str, place: int = 0) -> int:
    """The seed of a request that brings none, for its prompt number `place`: 64 bits of (job seed, custom_id)."""
    return int.from_bytes(blake2b(f"{seed}:{place}:{custom_id}".encode(), digest_size=8).digest(), "big")


@contextmanager
def noted_signals() -> Iterator[Callable[[], int]]:
    """Inside, SIGINT and SIGTERM are noted, not raised: the returned function gives the first one's number, or 0.
    Outside the main thread, where Python delivers no signals, nothing changes."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, frame: seen.append(number)) for number in numbers]
    try:
        yield lambda: seen[0] if seen else 0
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def _duplicate(line: Line) -> Line:
    error = Refusal(
        f"line {line.number}: custom_id {line.custom_id!r} was used by an earlier line; give each line its own",
        param="custom_id", code="duplicate_custom_id",
    )  # fmt: skip
    return replace(line, custom_id=f"tokenloom:line:{line.number}", error=error)


def _aborted(output: RequestOutput) -> bool:
    """The driver was stopped under it: it is not done, and the next run answers it."""
    return any(completion.finish_reason == "abort" for completion in output.outputs)


def _settings(llm: LLM, names: Sequence[str], seed: int, shard: tuple[int, int]) -> dict[str, Any]:
    """What the results depend on. Batch sizes are left out: a sample does not depend on its company."""
    weights = llm.engine.replicas[0].programs.params
    return {
        "format": 1,
        "model": Path(names[0]).name,
        "weights": _fingerprint(llm),
        "dtype": str(jax.tree.leaves(weights)[0].dtype),
        "max_model_len": llm.engine.max_model_len,
        "seed": seed,
        "shard": f"{shard[0]}/{shard[1]}",
    }


def _fingerprint(llm: LLM) -> str:
    """The checkpoint's files: names, sizes, both ends of each. Random weights: their config and seed."""
    found = blake2b(digest_size=16)
    if llm.folder is None:
        found.update(f"{llm.config}:{llm.seed}".encode())
        return found.hexdigest()
    if llm.weight_version:
        found.update(f"updated to {llm.weight_version}".encode())
    for path in sorted(path for path in llm.folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        found.update(f"{path.relative_to(llm.folder)}:{size}:".encode())
        with path.open("rb") as file:
            found.update(file.read(SAMPLED_BYTES))
            file.seek(max(0, size - SAMPLED_BYTES))
            found.update(file.read())
    return found.hexdigest()
