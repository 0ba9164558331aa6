"""Flover's slot compaction, the planner of benchmarks/flover.py."""

import itertools

import pytest
from tokenloom.benchmarks.slots import compact


@pytest.mark.parametrize("slots", [1, 5, 11])
def test_as_few_moves_as_any_contiguous_placement_needs(slots):
    """Every occupancy against brute force: the fewest live slots that lie outside some run of their number."""
    for live in itertools.product([False, True], repeat=slots):
        first, moves = compact(live)
        count, after = sum(live), set(itertools.compress(range(slots), live))
        outside = [len(after - set(range(s, s + count))) for s in range(slots - count + 1)]
        assert len(moves) == min(outside)
        for source, target in moves:
            assert source in after and target not in after
            after = after - {source} | {target}
        assert after == set(range(first, first + count))


def test_edges_cost_nothing_and_holes_one_move_each():
    assert compact([False, True, True, True])[1] == [] == compact([True, True, False, False])[1]
    assert compact([True, False, True, True, True]) == (0, [(4, 1)])
    assert compact([]) == (0, [])
