"""Telemetry: its lines add up, its counts are those of the programs, and the engine does not notice it."""

import importlib.util
import io
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params
from rich.console import Console
from tokenloom import LLM
from tokenloom.attention.batch import Shape, descriptor_size
from tokenloom.model.checkpoint import random_params
from tokenloom.model.config import AttentionConfig, Mamba2Config, MoEConfig
from tokenloom.serve.build import Build, build_engine, choose_numerics
from tokenloom.serve.cli import main
from tokenloom.serve.programs import backbone, head
from tokenloom.serve.telemetry.bound import BOUNDS, REMEDIES, bound
from tokenloom.serve.telemetry.ceilings import Ceilings, measure
from tokenloom.serve.telemetry.counters import Counters, Widths
from tokenloom.serve.telemetry.lines import Follower, Totals, read, step_line
from tokenloom.serve.telemetry.live import live, recent, view
from tokenloom.serve.telemetry.profile import trace
from tokenloom.serve.telemetry.recorder import Flight, Telemetry
from tokenloom.serve.telemetry.timeline import timeline
from tokenloom.tests.engines import ROOMY, TIGHT, engine, greedy, prompts
from tokenloom.tests.shapes import ALL

CEILINGS = Ceilings(1e10, 1e11)


def make(shape, path, **sizes) -> LLM:
    telemetry = Telemetry(path, ceilings=CEILINGS)
    return LLM.from_config(ALL[shape](), 0, strict=True, progress=False, telemetry=telemetry, **sizes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(path of a run that was closed, its prompts, its outputs, the same from an engine without telemetry)."""
    path = tmp_path_factory.mktemp("telemetry") / "run.jsonl"
    asked = prompts(8, 1, longest=60)
    with make("llama", path, **TIGHT) as llm:
        outputs = llm.generate(asked, greedy(12))
        more = llm.generate(prompts(6, 2), greedy(70))
    plain = engine("llama", tight=True)
    plain.reset_prefix_cache()
    return path, asked, outputs, more, plain.generate(asked, greedy(12))


# -- a run -----------------------------------------------------------------------------------------------------


def test_nothing_changes(run):
    """With telemetry and without: the same tokens and log-probabilities, to the bit."""
    assert [output.outputs[0] for output in run[2]] == [output.outputs[0] for output in run[4]]


def test_lines_add_up(run):
    path, asked, outputs, more, _ = run
    (record,) = read(path)
    steps = record.steps
    assert [step.step for step in steps] == list(range(len(steps)))
    made = [len(output.outputs[0].token_ids) for output in [*outputs, *more]]
    assert sum(step.generated for step in steps) == sum(made)
    first = [step for step in steps if step.preemptions == 0 and step.lookup_tokens <= sum(map(len, asked))]
    assert sum(step.prompt_tokens for step in first) == sum(map(len, asked)) - first[-1].hit_tokens
    assert sum(step.decodes for step in first) == sum(made[: len(asked)]) - len(asked)
    for step in steps:
        assert step.tokens == step.decodes + step.prompt_tokens <= step.padded_tokens
        assert step.padded_tokens == Shape(*step.shape).T and step.kind == Shape(*step.shape).kind
        assert step.pages_free + step.pages_used == record.run.pages
        assert step.running <= record.run.seats and step.generated <= step.sampled
        assert step.step_s == pytest.approx(step.device_s + step.host_gap_s) and step.device_s >= 0
        if step.step_s == 0:
            continue
        assert step.bandwidth_share * step.step_s == pytest.approx(step.bytes / CEILINGS.bandwidth, rel=1e-6)
        assert step.compute_share * step.step_s == pytest.approx(step.flops / CEILINGS.compute, rel=1e-6)
    assert steps[-1].preemptions > 0 and any(step.bound == "pages" for step in steps)
    spent = steps[-1].time - steps[0].time
    assert sum(step.step_s for step in steps) <= spent + steps[-1].step_s + 0.05


def test_the_summary_is_the_sum(run):
    (record,) = read(run[0])
    totals, again = record.summary, Totals.of(record.steps, record.run)
    assert totals.steps == again.steps == len(record.steps)
    assert totals.flops == sum(step.flops for step in record.steps) and totals.bytes == again.bytes
    assert totals.step_s == pytest.approx(sum(totals.bound_s.values()))
    share = totals.bytes / totals.step_s / CEILINGS.bandwidth
    assert totals.bandwidth_share == pytest.approx(share, rel=1e-6)
    assert totals.waste == pytest.approx(1 - totals.tokens / totals.padded_tokens)


def test_a_late_host_is_seen(tmp_path):
    """Made-up looks, in ms: a step takes 2, and the host is late once."""
    telemetry = Telemetry(tmp_path / "run.jsonl", ceilings=CEILINGS)

    def times(sent, busy_at, ready_at, waited, rested=False):
        flight = Flight(
            None, 0, 0.0, Shape(1, 1, 0, 0), [1], [], 1, 1, 0, 1, True, (1, 0, 0), 0, 0, 0,
            sent, rested, busy_at, ready_at, waited,
        )  # fmt: skip
        return telemetry._times(flight)

    assert times(10, 11, 12, True, rested=True) == (2, 0)  # the time before belongs to nobody
    assert times(11, 13, 14, True) == (2, 0)  # dispatched while the one before ran
    assert times(13, 14.5, 19, False) == (2, 0)  # seen done late: at its usual time
    assert times(19, 19, 21, True) == (2, 3)  # the device waited from 16 to 19
    assert times(20, 22.5, 26, False) == (2, 0)
    assert times(26, 26, 26.5, False) == (0.5, 3)  # no later than it was seen


@cache
def uncompiled(shape: str):
    """A model's programs, which nobody runs."""
    config, numerics = ALL[shape](), choose_numerics(None, "float32")
    sizes = Build(max_num_seqs=4, max_num_batched_tokens=64, page_size=16)
    return build_engine(config, numerics, random_params(config, numerics, 0), None, sizes)[1].programs


# -- counts ----------------------------------------------------------------------------------------------------


def products(jaxpr) -> int:
    """FLOPs of the dot products of a jaxpr, those inside loops (attention over pages) aside."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = 1
            for axis in contract:
                depth *= left[axis]
            total += 2 * depth * equation.outvars[0].aval.size
        elif equation.primitive.name not in ("while", "scan"):
            for inner in jaxprs_in_params(equation.params):
                total += products(inner)
    return total


@pytest.mark.parametrize("shape", sorted(ALL))
def test_flops_are_those_of_the_programs(shape):
    programs, config, lengths = uncompiled(shape), ALL[shape](), [5, 40, 33, 17]
    step, ints = Shape(4, 1, 0, 0), jnp.zeros(descriptor_size(Shape(4, 1, 0, 0), programs.width), jnp.int32)
    run = backbone(programs.graphdef, step, programs.width, programs.page_size, 32)
    seated = programs.sampler_state
    traced = jax.make_jaxpr(run)(programs.params, programs.state, seated.last_token, seated.length, ints)
    x = jnp.zeros((4, config.hidden_size))
    last = jax.make_jaxpr(head(programs.graphdef, programs.sampler))(
        programs.params, programs.sampler_state, x, ints[:12]
    )
    expected = products(traced.jaxpr) + products(last.jaxpr)
    for block in config.blocks:
        mixer, channel = block.mixer, block.channel
        if isinstance(channel, MoEConfig):  # its products lie inside a loop
            expected += 4 * channel.top_k * 3 * 2 * config.hidden_size * channel.intermediate
        if isinstance(mixer, Mamba2Config):
            expected += 4 * (5 * mixer.heads * mixer.head_dim * mixer.state + 2 * mixer.conv * mixer.conv_dim)
        if isinstance(mixer, AttentionConfig):
            for length in lengths:
                seen = [
                    key for key in range(length) if mixer.window is None or key > length - 1 - mixer.window
                ]
                expected += 4 * mixer.heads * mixer.head_dim * len(seen)
    assert Counters(config, Widths(4, 4, 4)).count(lengths, [], 4)[1] == expected


def test_flops_agree_with_the_compiler():
    """XLA's count of the whole decode program and head also has norms, softmax and masks, and a loop over pages
    once: between what the weights cost and 15 % more."""
    programs, counters = engine("llama").engine.programs, Counters(ALL["llama"](), Widths(4, 4, 4))
    counted = programs.compiled[Shape(4, 1, 0, 0)].cost_analysis()["flops"]
    weights = counters.count([0] * 4, [], 0)[1]
    assert weights <= counted <= 1.15 * weights


@pytest.mark.parametrize("window", [None, 7, 24])
@pytest.mark.parametrize("start, count", [(0, 5), (0, 40), (3, 9), (30, 12), (6, 1)])
def test_a_chunk_counts_each_visible_pair(window, start, count):
    config = ALL["llama"]()
    mixer = replace(config.blocks[0].mixer, window=window)
    config = replace(config, blocks=(replace(config.blocks[0], mixer=mixer),))
    counters = Counters(config, Widths(0, 0, 1))
    seen = [
        {key for key in range(place + 1) if window is None or key > place - window}
        for place in range(start, start + count)
    ]
    weights = 2 * (4096 * 2 + 2048 * 2 + 3 * 64 * 128) * count
    moved, flops = counters.count([], [(start, count)], 0)
    assert flops == weights + 4 * 64 * sum(map(len, seen))
    assert moved == 2 * 32 * (len(set.union(*seen)) + count)


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("shape", sorted(ALL))
def test_weights_are_those_of_the_model(shape, tokens):
    """Every matrix once; of an untied embedding the rows looked up, of a mixture the experts within reach."""
    config = ALL[shape]()
    expected = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(uncompiled(shape).params):
        name = jax.tree_util.keystr(path)
        if leaf.ndim == 3:
            expected += leaf.size * min(1.0, tokens * 2 / 6)
        elif "embedding" in name and not config.tie_embeddings:
            expected += tokens * config.hidden_size
        elif leaf.ndim == 2 and "conv" not in name:
            expected += leaf.size
    assert Counters(config, Widths(4, 4, 4)).weights(tokens) == pytest.approx(expected)


def test_decode_bytes_are_weights_and_live_keys():
    config = ALL["llama"]()
    counters = Counters(config, Widths(2, 0, 4))
    row = 2 * 2 * 32  # layers x (keys, values) x features
    assert counters.count([10, 20], [], 2)[0] == 2 * counters.weights(2) + 4 * row * (30 + 2)


# -- what binds ------------------------------------------------------------------------------------------------

CALM = dict(
    step_s=0.01, host_gap_s=0.0, bandwidth_share=0.8, compute_share=0.2, waiting=0, running=4, seats=8,
    room=True, preempted=0,
)  # fmt: skip
TABLE = [
    ({}, "bandwidth"),
    ({"bandwidth_share": 0.3}, "idle"),
    ({"bandwidth_share": 0.3, "running": 5}, "bandwidth"),
    ({"bandwidth_share": 0.3, "running": 8, "waiting": 2}, "seats"),
    ({"running": 8, "waiting": 2, "compute_share": 0.9}, "compute"),
    ({"running": 1, "compute_share": 0.9}, "compute"),
    ({"waiting": 2}, "pages"),
    ({"waiting": 2, "room": False}, "bandwidth"),
    ({"preempted": 1, "compute_share": 0.9}, "pages"),
    ({"host_gap_s": 0.001, "preempted": 1}, "host"),
    ({"host_gap_s": 0.0009}, "bandwidth"),
]


@pytest.mark.parametrize("changes, expected", TABLE)
def test_the_rule(changes, expected):
    assert bound(**{**CALM, **changes}) == expected


def test_the_table_covers_the_rule():
    assert {expected for _, expected in TABLE} == set(BOUNDS) == set(REMEDIES)


# -- reading ---------------------------------------------------------------------------------------------------


def test_torn_and_foreign_lines(run, tmp_path):
    whole, path = run[0].read_bytes(), tmp_path / "copy.jsonl"
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:9]) + lines[9][:50])
    assert len(read(path)[-1].steps) == 8 and read(path)[-1].summary is None
    Telemetry(path, ceilings=CEILINGS)  # a new run would follow: the torn end goes
    assert path.read_bytes() == b"".join(lines[:9])
    for bad in (
        b'{"custom_id": "a"}\n',
        b"[1]\n",
        b"not json\n",
        lines[9].replace(b'"tokens":', b'"token":'),
    ):
        path.write_bytes(b"".join(lines[:3]) + bad + lines[4])
        with pytest.raises(ValueError, match=r"copy\.jsonl, line 4 is not telemetry"):
            read(path)
    path.write_bytes(lines[1])
    with pytest.raises(ValueError, match="line 1 is not telemetry"):
        read(path)
    with pytest.raises(ValueError, match="holds no telemetry, so nothing is appended"):
        Telemetry(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no telemetry yet"):
        read(path)
    with pytest.raises(ValueError, match="cannot read telemetry"):
        read(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match="cannot write telemetry"):
        Telemetry(tmp_path / "no" / "folder.jsonl")


def test_a_file_is_followed_as_it_grows(run, tmp_path):
    whole, path = run[0].read_bytes(), tmp_path / "copy.jsonl"
    path.write_bytes(b"")
    follower, trimmed, seen = Follower(path), Follower(path, keep=5), 0
    for at in range(0, len(whole), 997):
        with path.open("ab") as file:
            file.write(whole[at : at + 997])
        records = follower.poll()
        assert len(trimmed.poll()[-1].steps) <= 10 if records else True
        assert not records or len(records[-1].steps) >= seen
        seen = len(records[-1].steps) if records else 0
    (record,) = read(run[0])
    assert follower.records[-1] == record and trimmed.records[-1].steps[-5:] == record.steps[-5:]
    assert "".join(map(step_line, record.steps)).encode() in whole


def test_one_telemetry_serves_one_llm(tmp_path):
    telemetry = Telemetry(tmp_path / "run.jsonl", ceilings=CEILINGS)
    with LLM.from_config(ALL["llama"](), progress=False, telemetry=telemetry, **ROOMY) as llm:
        llm.generate([[1, 2, 3]], greedy(2))
        assert llm.telemetry is telemetry and telemetry.totals.steps == 2
        assert len(read(telemetry.path)[-1].steps) == 2, "lines of an engine at rest are in the file"
        with pytest.raises(ValueError, match="make one for each LLM"):
            telemetry.start("again", llm.config, llm.engine)
    assert read(telemetry.path)[-1].summary.steps == 2


# -- showing ---------------------------------------------------------------------------------------------------


def snapshot(records, **more) -> str:
    console = Console(file=io.StringIO(), width=110)
    console.print(view(records, **more))
    return console.file.getvalue()


def test_the_view(run, capsys):
    (record,) = read(run[0])
    last, sums = record.steps[-1], Totals.of(recent(record.steps), record.run)
    text = snapshot([record])
    assert f"{sums.generated / sums.step_s:,.1f} tokens/s" in text and "closed" in text
    assert f"{last.running} of 3 seats, {last.waiting} waiting" in text
    assert f"{sums.bandwidth_share:.1%} of 10.0 GB/s" in text and f"{last.preemptions} preemptions" in text
    assert f"binds: {sums.bound}" in text
    assert "quiet for 60 s" in snapshot([replace(record, summary=None)], now=last.time + last.step_s + 60)
    assert "no step yet" in snapshot([replace(record, steps=[])]) and "waiting for a run" in snapshot([])
    assert main(["watch", str(run[0]), "--once"]) == 0
    assert "binds" in capsys.readouterr().out
    assert main(["watch", str(run[0])]) == 0, "a run that was closed is shown, not followed"


def test_the_view_in_a_notebook(run, capsys):
    shown = []
    with live(run[0], refresh=0.01, show=shown.append):
        while not shown:
            pass
    assert len(shown) >= 2
    with live(run[0]):
        pass
    assert "binds" in capsys.readouterr().out


def test_the_picture(run, tmp_path):
    figure = timeline(run[0])
    (record,) = read(run[0])
    assert len(figure.axes) == 6
    drawn = {text.get_text() for text in figure.axes[5].get_legend().get_texts()}
    assert drawn == {step.bound for step in record.steps}
    spans = sum(len(bars.get_paths()) for bars in figure.axes[5].collections)
    assert spans == len(record.steps)
    assert main(["timeline", str(run[0]), "-o", str(tmp_path / "run.png")]) == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        timeline(replace(record, steps=[]))


# -- the device ------------------------------------------------------------------------------------------------


def test_ceilings_are_measured_once():
    ceilings = measure(jax.devices()[0], "float32")
    assert ceilings.bandwidth > 1e8 and ceilings.compute > 1e8 and ceilings.dtype == "float32"
    assert measure(jax.devices()[0], "float32") is ceilings
    with pytest.raises(ValueError, match="above 0"):
        Ceilings(0, 1)


PROFILED = """
import sys
from tokenloom import LLM, SamplingParams
from tokenloom.tests.shapes import ALL
from tokenloom.tests.engines import ROOMY
with LLM.from_config(ALL["llama"](), 0, progress=False, **ROOMY) as llm, llm.profile(sys.argv[1]):
    llm.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=4, ignore_eos=True))
"""


def test_a_trace_names_the_steps(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROFILED, str(tmp_path / "trace")], env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    (plane,) = (tmp_path / "trace").rglob("*.xplane.pb")
    held = plane.read_bytes()
    for name in (b"prefill_B0_q1_R4_C32", b"decode_B2_q1_R0_C0", b"head_2", b"layer1", b"attend", b"channel"):
        assert name in held, name


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: nothing to refuse"
)
def test_a_trace_that_would_crash_is_refused(tmp_path):
    if jax.devices()[0].platform != "cpu" or jax.config.jax_platforms:
        pytest.skip("this process runs on another device, or without libtpu")
    with pytest.raises(ValueError, match="JAX_PLATFORMS=cpu"), trace(tmp_path):
        pass
