"""Several processes = one: what a model split over processes generates, and what happens when one is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from tokenloom import LLM, ProcessLost, SamplingParams, initialize
from tokenloom.model import checkpoint
from tokenloom.model.config import ModelConfig, MoEConfig, llama_config
from tokenloom.serve.channel import Door, Message, Wire, enter
from tokenloom.serve.processes import EXIT_CODE, Group
from tokenloom.serve.tokenizer import Tokenizer
from tokenloom.tests.devices import QUICK

SIZES = dict(max_num_seqs=2, max_num_batched_tokens=16, page_size=16, max_model_len=96, progress=False)
ALONE = SIZES | dict(max_num_seqs=1)
SECONDS = 240

START = """
import json, os, sys
index, count, port, timeout = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
import tokenloom
from tokenloom import LLM, SamplingParams
tokenloom.initialize("localhost:" + port, count, index, timeout=timeout)
from tokenloom.tests.test_processes import ALONE, SIZES, answers, small, tokenizer, wide
def say(*words):
    print(*words, flush=True)
"""

EQUAL = """
from tokenloom.serve import build
from tokenloom.serve.sampling.cyclic_reflex import CyclicReflex
from tokenloom.serve.sampling.mirostat import Mirostat
from tokenloom.serve.sampling.processors import LogitBias
unused = CyclicReflex, Mirostat, LogitBias
build.CONSTRAINED = tuple(one for one in build.CONSTRAINED if not isinstance(one, unused))  # less to compile
llm = LLM(small(), tokenizer=tokenizer(), strict=True, tensor_parallel_size=2, **SIZES)
if index:
    try:
        llm.generate([1, 2, 3])
    except ValueError as error:
        say("refused:", error)
if not llm.follow():
    for refused in (
        lambda: llm.update_weights(llm.engine.programs.params), lambda: llm.save("x"),
        lambda: tokenloom.BeamSearch(2).generate(llm, [[1, 2]], SamplingParams(max_tokens=2)),
    ):
        try:
            refused()
        except ValueError as error:
            say("refused:", error)
    say("outputs:", json.dumps(answers(llm, json.load(open(sys.argv[5])))))
    llm.close()
say("ended")
"""

LOST = """
from tokenloom.serve import build
from tokenloom.model.layers import Numerics
from tokenloom.serve.sampling.processors import Temperature, TokenMask
build.DEFAULT = (TokenMask(), Temperature())  # four times less to compile
build.choose_numerics = lambda *given: Numerics(platform="tpu")  # which stacks layers
llm = LLM(wide(), tensor_parallel_size=4, **ALONE)
try:
    if not llm.follow():
        first = answers(llm, json.load(open(sys.argv[5])))
        llm.update_weights(sys.argv[6])
        say("outputs:", json.dumps([first, answers(llm, json.load(open(sys.argv[5])))]))
        while True:
            llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
except tokenloom.ProcessLost as error:
    say("lost:", error)
    sys.exit(3)
"""

SPREAD = """
from tokenloom.serve import build
from tokenloom.serve.sampling.processors import Temperature, TokenMask
from tokenloom.tests.test_processes import PLANS, mixture
build.DEFAULT = (TokenMask(), Temperature())
for plan in PLANS[count]:
    llm = LLM(mixture(), **ALONE, **plan)
    if not llm.follow():
        say("outputs:", json.dumps(answers(llm, json.load(open(sys.argv[5])))))
        llm.close()
say("ended")
"""

PLANS = {
    2: (
        dict(sequence_parallel_size=2, sequence_parallel_form="ring"),
        dict(tensor_parallel_size=2, enable_expert_parallel=True),
    ),
    4: (
        dict(sequence_parallel_size=4, sequence_parallel_form="token_ring"),
        dict(tensor_parallel_size=4, enable_expert_parallel=True),
    ),
}

DIFFERENT = """
try:
    LLM(small(), tensor_parallel_size=2, **(SIZES | dict(max_num_seqs=2 + index)))
except ValueError as error:
    say("refused:", error)
try:
    LLM(small(), tensor_parallel_size=1, **SIZES)
except ValueError as error:
    say("refused:", error)
try:
    LLM("/not/a/folder" if index else small(), tensor_parallel_size=2, **SIZES)
except (ValueError, tokenloom.ProcessLost) as error:
    say("failed:", error)
"""

STUCK = """
import socket, threading
from tokenloom.serve.channel import Wire
from tokenloom.serve.processes import Group
here, there = socket.socketpair(socket.AF_UNIX)
group = Group(1, 2, {0: Wire(here, 1.0)}, 1.0)
with group.guard():
    threading.Event().wait()
"""


def small() -> ModelConfig:
    return llama_config(
        layers=1, hidden=64, heads=4, kv_heads=2, intermediate=128, vocab=4096, max_position=128
    )


def wide() -> ModelConfig:
    """Fewer KV heads than processes: its mesh has two axes."""
    return llama_config(
        layers=2, hidden=64, heads=4, kv_heads=2, intermediate=128, vocab=304, max_position=128
    )


def mixture() -> ModelConfig:
    """Four experts behind two KV heads."""
    config = llama_config(
        layers=1, hidden=64, heads=4, kv_heads=2, intermediate=128, vocab=304, max_position=128
    )
    return replace(config, blocks=(replace(config.blocks[0], channel=MoEConfig(4, 2, 64)),))


def tokenizer() -> Tokenizer:
    return Tokenizer.load(checkpoint.resolve("demo"))


def answers(llm: LLM, requests: list) -> list:
    """What an LLM says to [prompt, parameters] each, as plain numbers and texts."""
    params = [SamplingParams(**more) for _, more in requests]
    outputs = llm.generate([prompt for prompt, _ in requests], params)
    return [
        [
            one.error,
            [asdict(sample) for sample in one.outputs],
            one.prompt_logprobs and len(one.prompt_logprobs),
        ]
        for one in outputs
    ]


def started(
    code: str, count: int, folder: Path, *arguments: str, timeout: float = 60
) -> list[subprocess.Popen]:
    """`code` in so many processes; what each prints lies in folder/<index>."""
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": QUICK}
    env["PYTHONFAULTHANDLER"] = "1"
    return [
        subprocess.Popen(
            [sys.executable, "-c", START + code, str(index), str(count), port, str(timeout), *arguments],
            env=env, stdout=(folder / str(index)).open("w"), stderr=(folder / f"{index}.errors").open("w"),
        )
        for index in range(count)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen], folder: Path) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of each; none outlives this call, and one that hangs says where."""
    until = time.monotonic() + SECONDS
    try:
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(1.0, until - time.monotonic()))
    finally:
        for process in processes:
            process.send_signal(signal.SIGABRT)
            process.wait()
    return [
        (process.returncode, (folder / str(index)).read_text(), (folder / f"{index}.errors").read_text())
        for index, process in enumerate(processes)
    ]


def lines(text: str, label: str) -> list[str]:
    return [line.removeprefix(label).strip() for line in text.splitlines() if line.startswith(label)]


def test_two_processes_equal_one(tmp_path):
    """Greedy and sampled, several at once, a prompt in chunks, stop strings, scores, grammars."""
    with LLM(small(), tokenizer=tokenizer(), **SIZES) as llm:
        draws = np.random.default_rng(3)
        prompts = [draws.integers(0, 4096, size).tolist() for size in (45, 3, 20, 9, 12)]
        greedy = dict(temperature=0.0, max_tokens=10, ignore_eos=True, logprobs=2)
        text = llm.generate([prompts[1]], SamplingParams(**greedy))[0].outputs[0].text
        requests = [
            [prompts[0], greedy | dict(prompt_logprobs=1)],
            [prompts[1], greedy | dict(stop=[text[3:6]])],
            [prompts[2], dict(temperature=1.0, top_p=0.9, seed=7, max_tokens=8, ignore_eos=True, n=2)],
            [prompts[3], dict(temperature=0.8, seed=8, max_tokens=8, repetition_penalty=1.3)],
            [prompts[4], dict(temperature=0.0, max_tokens=8, structured_outputs={"choice": ["yes", "no"]})],
        ]
        expected = json.loads(json.dumps(answers(llm, requests)))
    (tmp_path / "requests").write_text(json.dumps(requests))
    found = ended(started(EQUAL, 2, tmp_path, str(tmp_path / "requests")), tmp_path)
    assert [code for code, _, _ in found] == [0, 0], found
    (line,) = lines(found[0][1], "outputs:")
    close(json.loads(line), expected)
    assert expected[1][1][0]["stop_reason"] == text[3:6] and expected[4][1][0]["text"] in ("yes", "no")
    (refused,) = lines(found[1][1], "refused:")
    assert "process 1 of 2: process 0 alone takes requests" in refused
    swap, save, search = lines(found[0][1], "refused:")
    assert "this model is spread over several" in search
    assert "give update_weights the folder's path" in swap and "open it in one process to save it" in save


@pytest.mark.parametrize("count", sorted(PLANS))
def test_texts_and_experts_over_processes_equal_one(tmp_path, count):
    """Each process has its part of every text, or its experts whole: chunks, greedy and sampled."""
    draws = np.random.default_rng(4)
    prompts = [draws.integers(0, 304, size).tolist() for size in (45, 7)]
    common = dict(max_tokens=6, ignore_eos=True)
    requests = [
        [prompts[0], common | dict(temperature=0.0, logprobs=2)],
        [prompts[1], common | dict(temperature=1.0, seed=7, n=2)],
    ]
    with LLM(mixture(), **ALONE) as llm:
        expected = json.loads(json.dumps(answers(llm, requests)))
    (tmp_path / "requests").write_text(json.dumps(requests))
    found = ended(started(SPREAD, count, tmp_path, str(tmp_path / "requests")), tmp_path)
    assert all(code == 0 and lines(text, "ended") for code, text, _ in found), found
    said = lines(found[0][1], "outputs:")
    assert len(said) == len(PLANS[count])
    for line in said:
        close(json.loads(line), expected)


def test_a_process_that_dies_is_named_by_all_others(tmp_path):
    """Four processes, stacked layers; weights swapped from a folder; then one is killed while it generates."""
    config = wide()
    folder = tmp_path / "weights"
    checkpoint.save_orbax(folder, checkpoint.random_params(config, seed=5), config)
    requests = [[[7, 8, 9] * 8, dict(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=2)]]
    (tmp_path / "requests").write_text(json.dumps(requests))
    processes = started(LOST, 4, tmp_path, str(tmp_path / "requests"), str(folder), timeout=30)
    until = time.monotonic() + SECONDS
    while not lines((tmp_path / "0").read_text(), "outputs:") and time.monotonic() < until:
        assert all(process.poll() is None for process in processes), ended(processes, tmp_path)
        time.sleep(0.2)
    processes[2].send_signal(signal.SIGKILL)
    found = ended(processes, tmp_path)
    assert found[2][0] == -signal.SIGKILL
    for index in (0, 1, 3):
        code, _, errors = found[index]
        assert code not in (0, -signal.SIGKILL), found[index]
        assert "process 2 of 4 has ended" in errors and f"this is process {index}" in errors
    assert found[0][0] == 3 and "process 2 of 4 has ended" in lines(found[0][1], "lost:")[0]
    with LLM(config, **ALONE) as llm:
        before = answers(llm, requests)
        llm.update_weights(folder)
        expected = json.loads(json.dumps([before, answers(llm, requests)]))
    for one, other in zip(json.loads(lines(found[0][1], "outputs:")[0]), expected, strict=True):
        close(one, other)


def close(found: list, expected: list) -> None:
    """The same texts, tokens and reasons; log-probabilities within rounding."""

    def bare(answer: list) -> list:
        return [
            answer[0],
            answer[2],
            [{k: v for k, v in one.items() if "logprob" not in k} for one in answer[1]],
        ]

    assert [bare(one) for one in found] == [bare(one) for one in expected]
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one[1], other[1], strict=True):
            if b["cumulative_logprob"] is not None:
                assert abs(a["cumulative_logprob"] - b["cumulative_logprob"]) < 1e-3


def test_settings_that_differ_are_named(tmp_path):
    found = ended(started(DIFFERENT, 2, tmp_path), tmp_path)
    assert all(len(lines(text, "refused:")) == 2 for _, text, _ in found), found
    for code, text, errors in found:
        differing, devices = lines(text, "refused:")
        assert (
            "process 1 runs other settings than process 0: max_num_seqs: 3 there, 2 in process 0" in differing
        )
        assert "does not take the same number from each of 2 processes" in devices, errors
        assert "split it over all 2" in devices and code == 0, errors
    (there,), (here,) = lines(found[1][1], "failed:"), lines(found[0][1], "failed:")
    assert "/not/a/folder" in there and "process 1 of 2 failed (ValueError: there is no folder" in here


def test_a_process_that_waits_for_a_lost_one_is_ended():
    """Nobody answers, and the main thread never comes back."""
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == EXIT_CODE, done
    assert "process 0 of 2 has not answered for 1 s" in done.stderr and "exit code 70" in done.stderr


def pair(timeout: float) -> tuple[Wire, Wire]:
    here, there = socket.socketpair(socket.AF_UNIX)
    return Wire(here, timeout), Wire(there, timeout)


def test_groups_agree_and_lose_each_other():
    a, b = pair(30.0)
    leader, follower = Group(0, 2, {1: a}, 30.0), Group(1, 2, {0: b}, 30.0)
    follower.reply({"number": 3})
    assert leader.least(5) == 3 and follower._next(0).values == {"number": 3}
    leader.announce("step", {"shape": [1, 2]}, {"packed": np.arange(3, dtype=np.int32)})
    message = follower.next()
    assert message.kind == "step" and message.arrays["packed"].tolist() == [0, 1, 2]
    follower.fail(MemoryError("no room"))
    assert leader._gone.wait(SECONDS)
    with pytest.raises(ProcessLost, match=r"process 1 of 2 failed \(MemoryError: no room\)"):
        leader.check()
    with pytest.raises(ProcessLost), leader.guard():
        raise AssertionError("not reached")
    leader.close()


def test_closing_is_no_loss():
    a, b = pair(30.0)
    leader, follower = Group(0, 2, {1: a}, 30.0), Group(1, 2, {0: b}, 30.0)
    leader.close()
    assert follower.next() is None and follower.lost is None
    follower.close()
    assert leader.lost is None


def test_one_that_differs_leaves_and_is_not_lost(monkeypatch):
    """It may be gone before process 0 goes on after telling it."""
    a, b = pair(30.0)
    leader, follower = Group(0, 2, {1: a}, 30.0), Group(1, 2, {0: b}, 30.0)
    refused = []

    def join():
        with pytest.raises(ValueError, match="other settings") as error:
            follower.agree({"a": "1"})
        refused.append(error)

    joining, tell = threading.Thread(target=join), leader._tell

    def tell_and_wait(message):
        tell(message)
        joining.join(SECONDS)
        leader._listeners[0].join(SECONDS)

    monkeypatch.setattr(leader, "_tell", tell_and_wait)
    joining.start()
    with pytest.raises(ValueError, match="a: 1 there, 2 in process 0"):
        leader.agree({"a": "2"})
    follower._listeners[0].join(SECONDS)
    assert refused and leader.lost is None and follower.lost is None


def test_messages_hold_numbers_only():
    arrays = {"a": np.array(3, np.int32), "b": np.ones((2, 3), bool), "c": np.zeros((0, 4), np.float32)}
    again = Message.decode(Message("step", {"x": [1, None]}, arrays).encode())
    assert again.kind == "step" and again.values == {"x": [1, None]}
    for name, array in arrays.items():
        assert again.arrays[name].dtype == array.dtype and again.arrays[name].shape == array.shape
        assert (again.arrays[name] == array).all()
    objects = Message("step", arrays={"a": np.array([1.0])}).encode().replace(b"<f8", b"|O8")
    for payload in (objects, b"", b"\x09\x00\x00\x00{", Message("step", arrays=arrays).encode()[:-1]):
        with pytest.raises(ValueError, match="same version of tokenloom"):
            Message.decode(payload)


def test_strangers_are_turned_away():
    door = Door("localhost")
    with socket.create_connection(("localhost", door.port)) as stranger:
        stranger.sendall(bytes(100))
        assert door.admit(SECONDS, 5.0) is None

    def knock(token: str, found: list) -> None:
        try:
            found.append(enter("localhost", door.port, token, 3, 30.0))
        except OSError as error:
            found.append(error)

    for token, welcome in (("wrong", False), (door.token, True)):
        found: list = []
        thread = threading.Thread(target=knock, args=(token, found))
        thread.start()
        admitted = door.admit(SECONDS, 30.0)
        thread.join()
        assert (admitted is not None) == isinstance(found[0], Wire) == welcome
    assert admitted is not None and admitted[0] == 3
    found[0].send(Message("hello").encode())
    assert admitted[1].receive().kind == "hello"
    door.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(coordinator_address="host", num_processes=2, process_id=0), "must be host:port"),
        (dict(coordinator_address="h:1", num_processes=2, process_id=2), "process_id=2 must be from 0 to"),
        (dict(num_processes=2, process_id=1), "go together"),
        (dict(timeout=0), "timeout=0 must be above 0"),
    ],
)
def test_wrong_arguments_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        initialize(**settings)
