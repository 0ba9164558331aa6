"""Laws of caches, over every policy: what a cache shows of a text depends on the text alone, and a cache that has room
for all of it is plain attention. Laws that a policy's abilities exclude are listed by the test of that name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from tokenloom.attention.caches.double_sparsity import DoubleSparsity
from tokenloom.attention.caches.gear import GEAR, Int4KV
from tokenloom.attention.caches.h2o import H2O
from tokenloom.attention.caches.paged import Pages
from tokenloom.attention.caches.policy import CachePolicy
from tokenloom.attention.caches.streaming import StreamingLLM
from tokenloom.attention.caches.tidal_decode import TidalDecode
from tokenloom.tests.cache_cases import Layer, dense_outputs, text
from tokenloom.tests.cache_references import expected

LENGTH, PROMPT = 26, 15


@dataclass(frozen=True)
class Case:
    """`small` forgets or rounds something of a text of LENGTH tokens; `roomy` does not (None: it always does).
    `near`: where codes are rounded, a last bit may become a step of f16."""

    small: CachePolicy
    roomy: CachePolicy | None
    near: float = 1e-5


CASES = {
    "pages": Case(Pages(), Pages()),
    "streaming": Case(StreamingLLM(2, 6), StreamingLLM(2, 24)),
    "double sparsity": Case(DoubleSparsity(5, 6), DoubleSparsity(26, 2)),
    "tidal": Case(TidalDecode(5, (2,)), TidalDecode(26, (2,))),
    "h2o": Case(H2O(6, 2), H2O(16, 12)),
    "int4": Case(Int4KV(group=4, block=4), None, 3e-3),
    "gear": Case(GEAR(group=4, block=4), None, 3e-3),
}
EACH = pytest.mark.parametrize("name", list(CASES))


@cache
def layer(policy: CachePolicy) -> Layer:
    """One compiled layer a policy; tests use its seats in turn, as requests do."""
    return Layer(policy)


@cache
def alone(policy: CachePolicy, seed: int, length: int = LENGTH, prompt: int = PROMPT) -> np.ndarray:
    """The reference of the laws: the text by itself, its prompt in one chunk."""
    return layer(policy).serve(0, text(length, seed), prompt)


@EACH
def test_room_for_all_is_dense(name):
    roomy = CASES[name].roomy
    if roomy is None:
        return  # listed by `test_excluded_laws_are_listed`
    np.testing.assert_allclose(alone(roomy, 1), dense_outputs(text(LENGTH, 1)), atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name != "pages"])
def test_what_is_read_equals_masks_by_brute_force(name):
    """Gathered, evicted or rotated anew: the numbers of full attention under the masks that the paper's rule gives."""
    small, near = CASES[name].small, CASES[name].near
    for seed, prompt in ((1, PROMPT), (5, 3)):
        np.testing.assert_allclose(
            alone(small, seed, prompt=prompt), expected(small, text(LENGTH, seed), prompt), atol=2 * near
        )


@EACH
def test_chunks_do_not_matter(name):
    small, near = CASES[name].small, CASES[name].near
    for chunk in (1, 4, 7):
        got = layer(small).serve(1, text(LENGTH, 1), PROMPT, chunk)
        np.testing.assert_allclose(got, alone(small, 1), atol=near)


@EACH
def test_company_does_not_matter(name):
    """Two texts at different places, one decoding beside the other's prompt, in steps that they share."""
    small, near = CASES[name].small, CASES[name].near
    one, texts = layer(small), {2: text(LENGTH, 2), 3: text(LENGTH, 3)}
    parts = {2: [], 3: []}

    def take(found):
        for seat, out in found.items():
            parts[seat].append(out)

    take(one.run(texts, {}, {2: (0, 9), 3: (0, 5)}))
    take(one.run(texts, {}, {3: (5, 9), 2: (9, PROMPT)}, final=(2,)))
    for place in range(PROMPT, PROMPT + 3):
        start = 9 + 2 * (place - PROMPT)
        take(one.run(texts, {2: place}, {3: (start, start + 2)}, final=(3,) if start + 2 == PROMPT else ()))
    for place in range(PROMPT + 3, LENGTH):
        take(one.run(texts, {3: place - 3, 2: place}, {}))
    for place in range(LENGTH - 3, LENGTH):
        take(one.run(texts, {3: place}, {}))
    for seat, found in parts.items():
        np.testing.assert_allclose(np.concatenate(found), alone(small, seat), atol=near)


@EACH
def test_only_real_tokens_leave_a_trace(name):
    """Idle rows and padding (large numbers) change nothing; a seat's next text sees nothing of the last one."""
    small, near = CASES[name].small, CASES[name].near
    one, before, mine = layer(small), text(LENGTH, 4), text(LENGTH, 5)
    one.serve(0, before, PROMPT)
    parts = [one.run({0: mine}, {}, {0: (0, PROMPT)}, (0,), garbage=1e3)[0]]
    for place in range(PROMPT, LENGTH):
        one.run({0: mine}, {}, {}, garbage=1e3)
        parts.append(one.run({0: mine}, {0: place}, {}, garbage=1e3)[0])
    np.testing.assert_allclose(np.concatenate(parts), alone(small, 5), atol=near)


@EACH
def test_abilities_tell_the_truth(name):
    """Text computed as one prompt equals prompt and generation exactly where the policy says "rebuildable"; numbers
    are those of full attention exactly where it says "exact"."""
    small, near = CASES[name].small, CASES[name].near
    whole = np.abs(alone(small, 1, prompt=LENGTH - 10)[-1] - alone(small, 1)[-1]).max() < near
    anew = np.abs(alone(small, 1, prompt=LENGTH)[-1] - alone(small, 1)[-1]).max() < near
    assert (whole and anew) == small.abilities.rebuildable
    exact = np.abs(alone(small, 1) - dense_outputs(text(LENGTH, 1))).max() < near
    assert exact == small.abilities.exact


def test_excluded_laws_are_listed(capsys):
    found = {name: case.small.abilities.turned_off for name, case in CASES.items()}
    lossy = [name for name, case in CASES.items() if case.roomy is None]
    with capsys.disabled():
        for name, words in found.items():
            print(f"\n{name}: without {words or 'nothing'}{'; never dense' if name in lossy else ''}", end="")
    assert found["pages"] == "" and "pages" not in lossy
