"""The laws of speculation: whatever drafts, the tokens are the target's; and what each drafter promises beside that."""

import random
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from tokenloom import LLM, CopySpec, DraftModel, SamplingParams, SmartSpec, TokenRecycling
from tokenloom.attention.caches.streaming import StreamingLLM
from tokenloom.model.config import llama_config
from tokenloom.serve.drafters.copy_spec import find
from tokenloom.serve.drafters.draft import Accepted, Draft, DraftShape, Pass, Rows
from tokenloom.serve.drafters.rejection import RejectionSampling
from tokenloom.serve.drafters.smart_spec import expected
from tokenloom.serve.drafters.token_recycling import OpenedTokenRecycling, template
from tokenloom.serve.sampling.sampler import Sampled, Sampler
from tokenloom.tests.engines import check_against_whole, engine, greedy, mixed, prompts
from tokenloom.tests.shapes import ALL, LENGTH, VOCAB, llama

OTHER = llama_config(
    layers=1, hidden=32, heads=2, kv_heads=2, intermediate=64, vocab=VOCAB, max_position=LENGTH
)
LINE = DraftModel(OTHER, tokens=3, verify="matching")
DRAFTERS = {
    "another model": LINE,
    "the same model": DraftModel(llama(), tokens=3, verify="matching"),
    "token recycling": TokenRecycling(nodes=12, depth=4),
    "copy": CopySpec(match=2, copy=6),
    "copy or another model": CopySpec(match=2, copy=4, fallback=LINE),
}
# Few programs: two rows, one size of chunk; tight: too few pages, so requests are preempted.
SIZES = dict(max_num_seqs=2, max_num_batched_tokens=32, page_size=16)
TIGHT = dict(max_num_seqs=2, max_num_batched_tokens=32, page_size=8, num_pages=26)
EACH = pytest.mark.parametrize("name", sorted(DRAFTERS))


@cache
def speculating(name: str, shape: str = "llama", tight: bool = False) -> LLM:
    sizes = TIGHT if tight else SIZES
    return LLM.from_config(ALL[shape](), 0, strict=True, progress=False, drafter=DRAFTERS[name], **sizes)


def acceptance(llm: LLM):
    speculation = llm.engine.programs.speculation
    assert speculation is not None
    return speculation.acceptance


@EACH
def test_greedy_tokens_are_the_plain_models(name):
    """Chains and trees, prompts in chunks beside, rows of any acceptance: every number is the plain model's."""
    llm = speculating(name)
    for output in llm.generate(prompts(9, 1), greedy(40)):
        check_against_whole("llama", output)
        assert len(output.outputs[0].token_ids) == 40
    assert llm.engine.pages.free == llm.engine.pages.num_pages - 1
    assert acceptance(llm).rows > 0


def test_trees_hold_with_windows_and_soft_caps():
    llm = speculating("token recycling", "windowed")
    for output in llm.generate(prompts(4, 2), greedy(40)):
        check_against_whole("windowed", output)
    assert acceptance(llm).tokens_per_step > 1.0, "nothing was accepted: the law was not tried"


@pytest.mark.parametrize("name", ["copy or another model", "token recycling"])
def test_preempted_sequences_go_on_as_if_nothing_had_been(name):
    llm = speculating(name, tight=True)
    before = llm.engine.scheduler.preemptions
    for output in llm.generate(prompts(9, 3), greedy(40)):
        check_against_whole("llama", output)
    assert llm.engine.scheduler.preemptions > before, "the pool was meant to be too small"
    assert llm.engine.pages.free == llm.engine.pages.num_pages - 1


@EACH
def test_seeded_samples_are_those_of_plain_decoding(name):
    """Penalties, masks, truncation, Mirostat, stops, n: drafts that are matched with samples change nothing."""
    draw = random.Random(5)
    drawn = prompts(12, 4, longest=90)
    params = [mixed(draw) for _ in drawn]
    plain, fast = (
        [[list(c.token_ids) for c in output.outputs] for output in llm.generate(drawn, params)]
        for llm in (engine("llama"), speculating(name))
    )
    # Sampling at a top-k or top-p edge may differ by rounding: at most one request of these.
    assert sum(a != b for a, b in zip(plain, fast)) <= 1


def test_texts_end_where_the_context_does():
    """The last drafts would lie behind the longest text."""
    llm = speculating("token recycling")
    for output in llm.generate([[1, 2, 3] * 50, [4, 5] * 60], greedy(1000)):
        assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == LENGTH
        check_against_whole("llama", output)


def test_segments_and_cached_prefixes():
    llm, drawn = speculating("another model"), prompts(4, 6)
    whole = llm.generate(drawn, greedy(30))
    parts = llm.generate(drawn, greedy(30, segment_tokens=7))
    while any(one.resumable for one in parts):
        parts = llm.resume(parts, segment_tokens=7)
    assert [one.outputs[0].token_ids for one in parts] == [one.outputs[0].token_ids for one in whole]
    assert llm.engine.pages.hit_tokens > 0


def test_the_same_model_as_a_draft_is_always_right():
    llm = speculating("the same model")
    before = list(acceptance(llm).emitted)
    llm.generate(prompts(4, 7), greedy(41))
    emitted = np.array(acceptance(llm).emitted)
    if before:
        emitted -= np.array(before)
    # Only the last step of a text may stop early; a draft that rounds differently may lose now and then.
    assert emitted[-1] >= 0.9 * emitted[0]


def test_grammars_speculate_nothing_and_stay_valid():
    llm = LLM(
        "demo",
        max_model_len=128,
        max_num_seqs=2,
        max_num_batched_tokens=32,
        drafter=TokenRecycling(nodes=8),
        progress=False,
    )
    from tokenloom import StructuredOutputs

    free = SamplingParams(temperature=0.0, max_tokens=20)
    bound = SamplingParams(
        temperature=0.0, max_tokens=20, structured_outputs=StructuredOutputs(choice=["yes", "nothing"])
    )
    together = llm.generate(["def f(", "x = "], [free, bound])
    assert together[1].outputs[0].text in ("yes", "nothing")
    assert together[0].outputs[0].text == llm.generate("def f(", free)[0].outputs[0].text


@pytest.mark.parametrize(
    ("shape", "more", "says"),
    [
        ("recurrent", {}, "recurrent layers"),
        ("llama", {"cache": StreamingLLM(4, 32)}, "forgotten"),
        ("llama", {"drafter": DraftModel(replace(OTHER, vocab_size=VOCAB + 1))}, "vocabulary"),
        ("llama", {"drafter": DraftModel(ALL["recurrent"]())}, "recurrent layers"),
        ("llama", {"drafter": TokenRecycling(candidates=VOCAB + 1)}, "vocabulary"),
    ],
)
def test_what_cannot_go_together_is_refused(shape, more, says):
    with pytest.raises(ValueError, match=says):
        LLM.from_config(ALL[shape](), 0, progress=False, **{"drafter": LINE} | SIZES | more)


# -- speculative sampling ------------------------------------------------------------------------------------


V, DRAWS = 5, 200_000


def tables(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of target and draft behind 0, 1 or 2 tokens: [2][V,V,V] read at (first, second), unlike each other."""
    draw = np.random.default_rng(seed)
    p = draw.normal(size=(3, V, V, V)) * 1.5
    return p, p + draw.normal(size=(3, V, V, V))


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def three_tokens(verifier: RejectionSampling, seed: int) -> np.ndarray:
    """i32[DRAWS,3]: texts of three tokens, two of them drafted, finished from the target where a draft was rejected."""
    p, q = tables(seed)
    draw = np.random.default_rng(seed + 1)
    zeros = np.zeros(DRAWS, int)

    def sample(weights: np.ndarray) -> np.ndarray:
        ends = weights.cumsum(-1)
        return (draw.random((len(weights), 1)) * ends[:, -1:] > ends).sum(-1).clip(max=V - 1)

    q0 = softmax(q[0])[zeros, zeros]
    first = sample(q0)
    q1 = softmax(q[1])[first, zeros]
    second = sample(q1)
    logits = np.stack([p[0][zeros, zeros], p[1][first, zeros], p[2][first, second]], 1)
    probs = np.stack([q0, q1, q1], 1)
    sampler = Sampler(V, DRAWS, ())
    state = sampler.init()
    words = draw.integers(0, 2**32, (DRAWS + 1, 2), dtype=np.uint32)
    state = replace(
        state,
        seeds=jnp.asarray(words),
        greedy=jnp.zeros(DRAWS + 1, bool),
        length=jnp.ones(DRAWS + 1, jnp.int32),
    )
    live = jnp.ones(DRAWS, bool)
    root = jnp.zeros(DRAWS, jnp.int32)
    rows = Rows(jnp.ones(DRAWS, jnp.int32), jnp.arange(DRAWS), live, jnp.zeros((DRAWS, 0), jnp.int32), root)
    tokens = jnp.stack([jnp.asarray(first), jnp.asarray(second)], 1).astype(jnp.int32)
    draft = Draft.chain(root, tokens, jnp.full(DRAWS, 2), jnp.asarray(probs, jnp.float32))
    accept = jax.jit(lambda s, d, z: verifier.accept(sampler, s, d, z, rows, 2)[0].sampled)
    sampled = accept(state, draft, jnp.asarray(logits, jnp.float32))
    text, count = np.array(sampled.token), np.asarray(sampled.count)
    short = count < 2
    text[short, 1] = sample(softmax(p[1])[text[short, 0], 0])
    short = count < 3
    text[short, 2] = sample(softmax(p[2])[text[short, 0], text[short, 1]])
    return text


def fits(text: np.ndarray, seed: int) -> float:
    """The p-value of the joint law of three tokens under the target."""
    p, _ = tables(seed)
    one, two, three = softmax(p[0])[0, 0], softmax(p[1])[:, 0], softmax(p[2])
    law = one[:, None, None] * two[:, :, None] * three
    seen = np.bincount(text @ np.array([V * V, V, 1]), minlength=V**3)
    return float(stats.chisquare(seen, law.reshape(-1) * DRAWS).pvalue)


@pytest.mark.parametrize("seed", [11, 12])
def test_rejection_sampling_keeps_the_targets_law(seed):
    assert fits(three_tokens(RejectionSampling(), seed), seed) > 0.001


def test_a_wrong_residual_is_noticed():
    """The control: rejected tokens drawn from the target itself, not from what the draft left of it."""

    class Wrong(RejectionSampling):
        def accept(self, sampler, seated, draft, logits, rows, depth):
            leaky = Draft(draft.token, draft.parent, draft.depth, draft.valid, draft.probs * 0.8)
            return super().accept(sampler, seated, leaky, logits, rows, depth)

    assert fits(three_tokens(Wrong(), 11), 11) < 1e-6


# -- drafters by themselves ----------------------------------------------------------------------------------


def test_copies_are_found_as_a_dictionary_finds_them():
    draw = random.Random(3)
    texts = [[draw.randrange(4) for _ in range(draw.randint(1, 40))] for _ in range(200)]
    padded = np.full((len(texts), 40), -1, np.int32)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = text
    count = np.array(list(map(len, texts)), np.int32)
    for match in (1, 2, 3):
        for latest in (False, True):
            found = np.asarray(find(jnp.asarray(padded), jnp.asarray(count), match, latest))
            for text, at in zip(texts, found):
                starts = [
                    s for s in range(len(text) - match) if text[s : s + match] == text[-match:]
                ]  # what lies behind each is at least one token
                assert at == ((starts[-1] if latest else starts[0]) + match if starts else 0)


def test_the_matrix_of_token_recycling_is_numpys():
    settings = TokenRecycling(nodes=6, candidates=3, depth=2)
    opened = OpenedTokenRecycling(settings, 20)
    draw = np.random.default_rng(0)
    B, N = 3, settings.shapes[0].slots
    token = draw.integers(0, 8, (B, N)).astype(np.int32)
    valid, live = draw.random((B, N)) < 0.8, np.array([True, True, False])
    logits = draw.normal(size=(B, N, 20)).astype(np.float32)
    before = draw.integers(0, 20, (20, 3)).astype(np.int32)
    wanted = before.copy()
    for slot in reversed(range(N)):  # the smallest slot, then row, writes last
        for row in reversed(range(B)):
            if valid[row, slot] and live[row]:
                wanted[token[row, slot]] = np.argsort(-logits[row, slot], kind="stable")[:3]
    rows = Rows(*(jnp.zeros(B, jnp.int32),) * 2, jnp.asarray(live), jnp.zeros((B, 0), jnp.int32), token[:, 0])
    nothing = jnp.zeros((B, 1), jnp.int32)
    draft = Draft(jnp.asarray(token), nothing, nothing, jnp.asarray(valid))
    accepted = Accepted(Sampled(nothing, nothing, nothing), nothing)
    after = opened.commit({}, jnp.asarray(before), rows, draft, Pass(jnp.asarray(logits)), accepted)
    np.testing.assert_array_equal(after, wanted)


def test_templates_are_trees_of_the_likeliest_paths():
    parents, ranks = template(80, 8, 6, 1.7)
    assert len(parents) == 80 and all(parent <= slot for slot, parent in enumerate(parents))
    assert len(set(zip(parents, ranks))) == 80, "two slots would hold the same token"
    assert template(1, 8, 6, 1.7) == ((0,), (0,))


# -- the controller ------------------------------------------------------------------------------------------


def told(seconds, shapes=(2, 4, 8), **settings) -> SmartSpec:
    controller = SmartSpec(**settings)
    lines = [DraftShape.line(tokens) for tokens in shapes]
    controller.calibrate(
        lines, [1, 8], lambda shape, rows: seconds(0 if shape is None else shape.depth, rows)
    )
    return controller


def test_expected_tokens_are_those_of_a_coin():
    draw = np.random.default_rng(1)
    for a in (0.2, 0.7, 1.0):
        runs = (draw.random((100_000, 5)) < a).cumprod(1).sum(1) + 1
        assert abs(runs.mean() - expected(a, 5)) <= 4 * runs.std() / 316 + 1e-9


def test_free_drafts_are_taken_whole_and_dear_ones_not_at_all():
    assert told(lambda depth, rows: 1.0).choose(1) == DraftShape.line(8)
    assert told(lambda depth, rows: 1.0 + depth).choose(1) is None
    # At one row drafts are free, at eight each costs as much as a step.
    both = told(lambda depth, rows: 1.0 + (depth if rows == 8 else 0))
    assert both.choose(1) == DraftShape.line(8) and both.choose(5) is None


def test_bad_drafts_turn_speculation_off_and_a_probe_turns_it_on():
    controller = told(lambda depth, rows: 1.0 + 0.1 * depth, probe=10, every=1)
    for _ in range(40):
        controller.observe(DraftShape.line(4), [1, 1, 1])
    chosen = [controller.choose(3) for _ in range(30)]
    assert [shape is None for shape in chosen] == [place % 10 != 9 for place in range(30)]
    for _ in range(40):
        controller.observe(DraftShape.line(2), [3, 3, 3])
    assert controller.choose(3) == DraftShape.line(8)


def test_goodput_is_never_far_below_the_better_of_on_and_off():
    """A model of steps: weights are read once, tokens and drafts cost; whether drafts are right is chance. At any load
    and any acceptance SmartSpec takes at most 3 % longer than drafting always, and than never."""
    loads = (1, 2, 4, 8, 16, 32)

    def seconds(depth, rows):
        return 5.0 + 0.225 * rows * (depth + 1) + (0.05 * rows + 1.1) * depth

    for a in (0.2, 0.4, 0.5, 0.6, 0.7, 0.9):
        for rows in loads:
            draw, controller, spent, made = np.random.default_rng(rows), SmartSpec(), 0.0, 0
            controller.calibrate(
                [DraftShape.line(2), DraftShape.line(4)], loads,
                lambda shape, width: seconds(0 if shape is None else shape.depth, width),
            )  # fmt: skip
            for _ in range(1500):
                shape = controller.choose(rows)
                depth = 0 if shape is None else shape.depth
                emitted = (draw.random((rows, depth)) < a).cumprod(1).sum(1) + 1
                spent, made = spent + seconds(depth, rows), made + emitted.sum()
                if shape is not None:
                    controller.observe(shape, emitted.tolist())
            better = min(seconds(0, rows), seconds(4, rows) / expected(a, 4)) / rows
            assert spent / made <= 1.03 * better, (a, rows)


def test_a_controller_that_comes_and_goes_changes_no_token():
    """Shapes of every size, and steps without a draft, in one text."""

    class Restless(SmartSpec):
        def choose(self, rows):
            self._steps += 1
            return [None, *(DraftShape.line(n) for n in (1, 3))][self._steps % 3]

    llm = LLM.from_config(
        llama(), 0, progress=False, strict=True, controller=Restless(),
        drafter=DraftModel(OTHER, tokens=(1, 3), verify="matching"), **SIZES,
    )  # fmt: skip
    for output in llm.generate(prompts(5, 8), greedy(30)):
        check_against_whole("llama", output)
    assert {len(acceptance(llm).emitted)} == {4}
