"""Batch jobs: every line is answered once, and the results do not depend on kills, shards or the order."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenloom import SamplingParams
from tokenloom.serve import cli
from tokenloom.serve.batch import request_seed, run_batch
from tokenloom.serve.batch_files import BatchStopped, ResultFile, parse_line
from tokenloom.serve.bounds import Bounds
from tokenloom.serve.openai import parse, served_names
from tokenloom.tests import tiny
from tokenloom.tests.kills import count_lines, differing, results, run_and_kill, write_input

EXAMPLES = int(os.environ.get("TOKENLOOM_EXAMPLES", "1000"))
# Company changes rounding; a sample that lies within it of another one may differ (docs: one in 10,000 tokens).
TIES = 1


@pytest.fixture(scope="module")
def llm():
    return tiny.llm()


@pytest.fixture(scope="module")
def whole(llm, tmp_path_factory):
    """A job of 60 requests and its uninterrupted results."""
    folder = tmp_path_factory.mktemp("whole")
    write_input(folder / "in.jsonl", 60)
    run_batch(llm, folder / "in.jsonl", folder / "out.jsonl")
    return folder / "in.jsonl", folder / "out.jsonl"


def line(custom_id, url="/v1/completions", method="POST", **body) -> bytes:
    body = body or {"prompt": "def f(", "max_tokens": 4}
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body}).encode()


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hello"}]
BAD = {
    "not json": (b"{'custom_id': 1}", "not JSON"),
    "cut": (line("cut")[:-9], "not JSON"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "not utf-8": (b'{"custom_id": "\xff"}', "not JSON"),
    "array": (b"[1, 2]", "must be a JSON object"),
    "no id": (b'{"method": "POST", "url": "/v1/completions", "body": {}}', "custom_id must be"),
    "id is a number": (line(5), "custom_id must be"),
    "id is half a pair": (line("\ud800"), "custom_id must be"),
    "id is reserved": (line("tokenloom:line:1"), "custom_id must be"),
    "key": (b'{"custom_id": "k", "method": "POST", "url": "/v1/completions", "body": {}, "x": 1}', "'x'"),
    "method": (line("method", method="GET"), "method must be"),
    "url": (line("url", url="/v1/embeddings"), "not served"),
    "url type": (line("url type", url=["a"]), "url must be text"),
    "field": (line("field", prompt="a", speed=3), "'speed' is not supported"),
    "type": (line("type", prompt="a", max_tokens="many"), "max_tokens='many'"),
    "range": (line("range", prompt="a", temperature=-1), "temperature=-1"),
    "too long": (line("too long", prompt=[7] * 500), "500 tokens"),
    "outside": (line("outside", prompt=[10**6]), "outside the vocabulary"),
    "empty": (line("empty", prompt=""), "empty"),
    "model": (line("model", model="gpt-5", prompt="a"), "not served here"),
    "stream": (line("stream", prompt="a", stream=True), "no meaning in a batch"),
    "role": (line("role", CHAT, messages=[{"role": "pirate", "content": "a"}]), "roles are"),
    "one of two": (line("one of two", prompt=["a", [10**6]]), "outside the vocabulary"),
}


def test_every_kind_of_line(llm, tmp_path):
    good = {
        "text": line("text", prompt="def f(", max_tokens=6),
        "ids": line("ids", prompt=[5, 6, 7], max_tokens=6, seed=3),
        "several": line("several", prompt=["a", [8, 9]], max_tokens=6, n=2, logprobs=2),
        "chat": line("chat", CHAT, messages=USER, max_tokens=6, logprobs=True, top_logprobs=2),
    }
    ordered = [
        *good.values(),
        b"",
        *(raw for raw, _ in BAD.values()),
        line("text"),
        line("after", prompt="b"),
    ]
    summary = run_batch(llm, write(tmp_path / "in.jsonl", *ordered), tmp_path / "out.jsonl")
    found = results(tmp_path / "out.jsonl")
    assert len(found) == len(good) + len(BAD) + 2 == summary.lines
    assert summary.failed == len(BAD) + 1 and summary.completed == len(good) + 1
    for place, (raw, reason) in enumerate(BAD.values(), len(good) + 2):
        try:
            name = json.loads(raw)["custom_id"]
        except (ValueError, KeyError, TypeError, RecursionError):
            name = None
        usable = isinstance(name, str) and not name.startswith("tokenloom:") and "\ud800" not in name
        record = found[name if usable else f"tokenloom:line:{place}"]
        assert reason in record["error"]["message"], record
        assert record["response"]["status_code"] in (400, 404)
        assert record["response"]["body"]["error"]["message"] == record["error"]["message"]
    assert "used by an earlier line" in found[f"tokenloom:line:{len(ordered) - 1}"]["error"]["message"]
    bodies = {name: found[name]["response"]["body"] for name in [*good, "after"]}
    assert all(found[name]["error"] is None for name in bodies)

    def expected(prompt, seed, **more):
        params = SamplingParams(max_tokens=6, seed=seed, **more)
        return [one.text for one in llm.generate(prompt, params)[0].outputs]

    def texts(name):
        return [choice["text"] for choice in bodies[name]["choices"]]

    assert texts("text") == expected("def f(", request_seed(0, "text"))
    assert texts("ids") == expected([5, 6, 7], 3)
    assert texts("several") == [
        *expected("a", request_seed(0, "several", 0), n=2), *expected([8, 9], request_seed(0, "several", 1), n=2)
    ]  # fmt: skip
    assert [choice["index"] for choice in bodies["several"]["choices"]] == [0, 1, 2, 3]
    assert bodies["several"]["usage"] == {"prompt_tokens": 3, "completion_tokens": 24, "total_tokens": 27}
    chat = bodies["chat"]["choices"][0]
    assert [chat["message"]["content"]] == expected(llm.chat_prompt(USER), request_seed(0, "chat"))
    assert len(chat["logprobs"]["content"]) == 6 and bodies["chat"]["object"] == "chat.completion"


def test_a_finished_job_does_nothing_and_new_lines_are_added(llm, tmp_path):
    source, target = write(tmp_path / "in.jsonl", line("a"), b"oops", line("b")), tmp_path / "out.jsonl"
    run_batch(llm, source, target)
    before = target.read_bytes()
    again = run_batch(llm, source, target)
    assert target.read_bytes() == before
    assert (again.completed, again.failed, again.earlier, again.failed_earlier) == (0, 0, 3, 1)
    write(source, line("a"), b"oops", line("b"), line("c"))
    assert run_batch(llm, source, target).completed == 1 and set(results(target)) >= {"a", "b", "c"}


def test_an_output_cut_anywhere_is_completed(llm, whole, tmp_path):
    """What a crash may leave, a torn last line included, at drawn bytes."""
    source, finished = whole
    data, expected, draw = finished.read_bytes(), results(finished), random.Random(0)
    for cut in [0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(4))]:
        target = tmp_path / f"{cut}.jsonl"
        target.write_bytes(data[:cut])
        (tmp_path / f"{cut}.jsonl.job").write_bytes(finished.with_name("out.jsonl.job").read_bytes())
        summary = run_batch(llm, source, target)
        assert summary.earlier == data[:cut].count(b"\n")
        assert target.read_bytes().startswith(data[: data[:cut].rfind(b"\n") + 1])
        assert len(differing(results(target), expected)) <= TIES


def test_five_kills_change_nothing(llm, whole, tmp_path):
    folder, target = tiny.save(tmp_path / "model"), tmp_path / "out.jsonl"
    source, finished = whole
    draw, total = random.Random(), count_lines(source)
    lengths = []
    for _ in range(5):
        lines = draw.choice([0, draw.randint(1, total // 5)])
        lengths.append(
            run_and_kill(folder, source, target, lines, draw.uniform(0, 2.0 if lines == 0 else 0.02))
        )
    assert lengths == sorted(lengths), "a result was lost"
    done = subprocess.run(
        [sys.executable, "-m", "tokenloom.serve.cli", "batch", str(source), "-o", str(target), "--model", str(folder),
         "--max-model-len", str(tiny.LENGTH), "--max-num-seqs", "4", "--max-num-batched-tokens", "32",
         "--no-progress"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr  # some of its lines are errors
    found, expected = results(target), results(finished)
    for record in [
        *found.values(),
        *expected.values(),
    ]:  # they hold the model's name and the settings' digest
        record["response"]["body"] = {**record["response"]["body"], "id": "", "model": ""}
        record["id"] = record["response"]["request_id"] = ""
    assert len(differing(found, expected)) <= TIES


def test_a_full_queue_is_waited_for(llm, tmp_path, monkeypatch):
    """One request may bring more prompts than may wait."""
    body = dict(prompt=[f"def f{index}(" for index in range(12)], max_tokens=8, seed=1)
    source = write(tmp_path / "in.jsonl", line("many", **body), line("b"))
    run_batch(llm, source, tmp_path / "free.jsonl")
    refusals = []
    check_room = Bounds.check_room

    def noted(self, waiting):
        refusals.append(waiting >= 1)
        check_room(self, waiting)

    monkeypatch.setattr(Bounds, "check_room", noted)
    monkeypatch.setattr(llm.engine, "bounds", Bounds(max_waiting=1))
    run_batch(llm, source, tmp_path / "bound.jsonl")
    assert any(refusals), "the queue was meant to be too short"
    assert differing(results(tmp_path / "bound.jsonl"), results(tmp_path / "free.jsonl")) == []


def test_shards_answer_every_line_once(llm, whole, tmp_path):
    source, finished = whole
    parts = [tmp_path / f"{part}.jsonl" for part in range(3)]
    for part, target in enumerate(parts):
        run_batch(llm, source, target, shard=(part, 3))
    found = [results(target) for target in parts]
    assert all(found) and sum(map(len, found)) == count_lines(source)
    together, expected = {**found[0], **found[1], **found[2]}, results(finished)
    for record in [*together.values(), *expected.values()]:
        record["id"] = record["response"]["request_id"] = ""
        record["response"]["body"].pop("id", None)
    assert len(differing(together, expected)) <= TIES
    with pytest.raises(ValueError, match="shard 3/3 does not exist"):
        run_batch(llm, source, tmp_path / "x.jsonl", shard=(3, 3))


@contextmanager
def at_result(monkeypatch, number, action):
    """Run `action` when the job appends its result number `number`."""
    append, count = ResultFile.append, [0]

    def hooked(self, record):
        append(self, record)
        count[0] += 1
        if count[0] == number:
            action()

    with monkeypatch.context() as patch:
        patch.setattr(ResultFile, "append", hooked)
        yield


@pytest.mark.parametrize("number, raised", [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_signals_keep_what_is_complete(llm, whole, tmp_path, monkeypatch, number, raised):
    source, finished = whole
    target, handler = tmp_path / "out.jsonl", signal.getsignal(number)
    with at_result(monkeypatch, 9, lambda: signal.raise_signal(number)), pytest.raises(raised) as stopped:
        run_batch(llm, source, target, flush_seconds=60)
    assert number == signal.SIGINT or stopped.value.code == 143
    assert signal.getsignal(number) is handler
    assert 9 <= len(results(target)) < count_lines(source)
    assert not llm.engine.scheduler.busy
    run_batch(llm, source, target)
    assert len(differing(results(target), results(finished))) <= TIES


def test_disk_full_keeps_whole_results(llm, whole, tmp_path, monkeypatch, capsys):
    """The kernel refuses in the middle of a line: a limit on the file's size."""
    source, finished = whole
    target, soft = tmp_path / "out.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(cli, "_open", lambda *_, **__: nullcontext(llm))
    command = ["batch", str(source), "-o", str(target), "--no-progress"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, soft[1]))
    try:
        assert cli.main(command) == 3
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert "cannot write to" in capsys.readouterr().err
    kept = target.read_bytes()
    assert kept.endswith(b"\n") and len(kept) <= 6000
    assert cli.main(command) == 1 and target.read_bytes().startswith(kept)  # 1: some lines are errors
    assert len(differing(results(target), results(finished))) <= TIES


def test_a_short_write_goes_on_and_a_failed_one_keeps_whole_lines(tmp_path):
    def short(fd, data):
        return os.write(fd, data[:7])

    with ResultFile(tmp_path / "a.jsonl", {}, write=short) as file:
        file.append({"id": "batch_req_1", "custom_id": "a", "error": None})
    assert json.loads((tmp_path / "a.jsonl").read_text())["custom_id"] == "a"

    def full(fd, data):
        if os.fstat(fd).st_size > 80:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.write(fd, data[:7])

    with (
        pytest.raises(BatchStopped, match="No space left"),
        ResultFile(tmp_path / "b.jsonl", {}, write=full) as file,
    ):
        file.append({"id": "batch_req_1", "custom_id": "a", "error": None})
        file.append({"id": "batch_req_2", "custom_id": "b", "error": None})
    assert [*results(tmp_path / "b.jsonl")] == ["a"]


@pytest.mark.parametrize("part", ["step", "add"])
def test_a_broken_engine_keeps_results(llm, whole, tmp_path, monkeypatch, part):
    source, finished = whole
    target = tmp_path / "out.jsonl"

    def broken(*_):
        raise RuntimeError("the device is gone")

    with (
        monkeypatch.context() as patch,
        at_result(monkeypatch, 9, lambda: patch.setattr(llm.engine, part, broken)),
        pytest.raises(BatchStopped, match="the device is gone"),
    ):
        run_batch(llm, source, target, flush_seconds=60)
    llm.abort()
    assert len(results(target)) >= 9
    run_batch(llm, source, target)
    assert len(differing(results(target), results(finished))) <= TIES


def test_a_removed_output_is_saved(llm, whole, tmp_path, monkeypatch):
    source, finished = whole
    target = tmp_path / "out.jsonl"
    with (
        at_result(monkeypatch, 20, target.unlink),
        pytest.raises(BatchStopped, match="removed while the job ran; its results are saved"),
    ):
        run_batch(llm, source, target, flush_seconds=0)
    assert len(results(target)) >= 20
    with (
        at_result(monkeypatch, 5, lambda: target.rename(tmp_path / "moved.jsonl")),
        pytest.raises(BatchStopped, match="was moved"),
    ):
        run_batch(llm, source, target, flush_seconds=0)
    (tmp_path / "moved.jsonl").rename(target)
    run_batch(llm, source, target)
    assert len(differing(results(target), results(finished))) <= TIES


def test_a_job_goes_on_only_as_it_began(llm, tmp_path):
    source, target = write(tmp_path / "in.jsonl", line("a"), line("b")), tmp_path / "out.jsonl"
    run_batch(llm, source, target)
    before = target.read_bytes()
    with pytest.raises(ValueError, match=r"other settings .seed 0 -> 1.*shard '0/1' -> '0/2'"):
        run_batch(llm, source, target, seed=1, shard=(0, 2))
    write(source, line("a"), line("b", prompt="something else"))
    with pytest.raises(ValueError, match=r"line 2 .*custom_id 'b'.*reads differently now"):
        run_batch(llm, source, target)
    with ResultFile(target, json.loads((tmp_path / "out.jsonl.job").read_text())), pytest.raises(
        ValueError, match="another process is writing"
    ):  # fmt: skip
        run_batch(llm, source, target)
    assert target.read_bytes() == before
    (tmp_path / "out.jsonl.job").unlink()
    with pytest.raises(ValueError, match=r"out\.jsonl\.job beside it cannot be read"):
        run_batch(llm, source, target)
    target.write_bytes(b"hello\n" + before)
    (tmp_path / "other.jsonl").write_bytes(before)
    for wrong, reason in (
        (source, "the same file"),
        (tmp_path, "cannot write"),
        (tmp_path / "a/b", "cannot write"),
    ):
        with pytest.raises(ValueError, match=reason):
            run_batch(llm, source, wrong)
    with pytest.raises(ValueError, match="is not a file"):
        run_batch(llm, tmp_path / "none.jsonl", target)


def test_what_is_no_result_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    record = b'{"id": "batch_req_1", "custom_id": "a", "error": null}\n'
    with ResultFile(path, {}):
        pass
    path.write_bytes(b"hello\n" + record)
    with pytest.raises(ValueError, match="line 1 of"):
        ResultFile(path, {})
    path.write_bytes(record + b"\0\0\0\n")  # the last line, torn by a power failure
    with ResultFile(path, {}) as file:
        assert len(file.done) == 1
    assert path.read_bytes() == record


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["", "\ud800", 10**400, -1, 2**63, {"type": "text"}, [[]], "a" * 2000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
COMPLETION = {
    "custom_id": "a", "method": "POST", "url": "/v1/completions",
    "body": {"prompt": "a", "max_tokens": 3, "n": 1, "seed": 1, "stop": ["x"], "logit_bias": {"5": 1}, "echo": True,
             "logprobs": 1, "top_k": 4, "stop_token_ids": [9], "bad_words": ["b"], "min_tokens": 1},
}  # fmt: skip
CONVERSATION = {
    "custom_id": "a", "method": "POST", "url": CHAT,
    "body": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "max_tokens": 3,
             "tools": [{"type": "function"}], "tool_choice": "auto", "top_logprobs": 1, "logprobs": True,
             "chat_template_kwargs": {"x": 1}, "documents": [{"text": "d"}], "response_format": {"type": "text"}},
}  # fmt: skip


@st.composite
def malformed(draw) -> bytes:
    """A good line with something replaced, removed or added anywhere in it, as JSON or as bytes."""
    value = json.loads(json.dumps(draw(st.sampled_from([COMPLETION, CONVERSATION]))))
    for _ in range(draw(st.integers(1, 2))):
        place = value
        while draw(st.booleans()) and (
            inner := [v for v in _values(place) if isinstance(v, (dict, list)) and v]
        ):
            place = draw(st.sampled_from(inner))
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys)) if keys else None
        if isinstance(place, dict) and (key is None or draw(st.integers(0, 5)) == 0):
            key = draw(
                st.text(max_size=6) | st.sampled_from(["suffix", "stream", "model", "timeout_s", "best_of"])
            )
        if key is not None:
            place[key] = deepcopy(draw(JSON))  # sampled lists are shared
    raw = json.dumps(value).encode()
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.binary(max_size=4)) + raw[at + draw(st.integers(0, 40)) :]
    return raw.replace(b"\n", b" ")


def _values(place):
    return list(place.values()) if isinstance(place, dict) else place


def test_malformed_lines_are_refused_one_by_one(llm, tmp_path):
    """TOKENLOOM_EXAMPLES=10000 tries more of them. Some go through a whole job, with good lines between."""
    kept: list[bytes] = []
    names = served_names(llm)

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(malformed())
    def check(raw):
        found = parse_line(1, raw)
        try:
            if found.error is not None:
                raise found.error
            call = parse(found.url, found.body, llm, names)
            for prompt in call.prompts:
                llm._abort([llm.enqueue(*llm.tokens(prompt), call.params)])
        except ValueError as error:
            assert len(str(error)) > 10
        kept.append(raw)

    expected = llm.generate("def f(", SamplingParams(max_tokens=4, seed=5))[0].outputs[0].text
    check()
    chosen = random.Random(0).sample(kept, 40)
    lines = []
    for number, raw in enumerate(chosen):
        lines += [raw.replace(b'"custom_id": "a"', b'"custom_id": "bad %d"' % number) or b"?"]
        lines += [line(f"good {number}", prompt="def f(", max_tokens=4, seed=5)]
    summary = run_batch(llm, write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl")
    found = results(tmp_path / "out.jsonl")
    assert len(found) == summary.lines and summary.failed >= 5
    for number in range(len(chosen)):
        assert found[f"good {number}"]["response"]["body"]["choices"][0]["text"] == expected
    assert not llm.engine.scheduler.busy and llm.engine.pages.free == llm.engine.pages.num_pages - 1
