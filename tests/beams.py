"""A plain reference for searches by beams: whole candidate lists, sorted, over full forward passes."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# texts (tuples of generated tokens) -> log-probabilities f64[len(texts), V] of the next token
Scores = Callable[[list[tuple[int, ...]]], np.ndarray]


@dataclass(frozen=True)
class Found:
    """A complete text: its objective with what diversity cost, and its log-probability."""

    tokens: tuple[int, ...]
    objective: float
    logprob: float
    group: int


def complete(kept: list[Found], size: int, penalty: float) -> list[Found]:
    return sorted(kept, key=lambda one: -one.objective / len(one.tokens) ** penalty)[:size]


def search(
    scores: Scores, width: int, *, longest: int, ends: set[int] = frozenset(), penalty: float = 1.0,
    early: bool | str = False, groups: int = 1, diversity: float = 0.0,
) -> tuple[list[Found], list[list[list[int]]]]:  # fmt: skip
    """(complete texts of all groups, best first; the tokens that each group's beams took at each step)."""
    size = width // groups
    beams = [[((), 0.0, 0.0)] for _ in range(groups)]  # text, objective, log-probability
    kept: list[list[Found]] = [[] for _ in range(groups)]
    over, taken = [False] * groups, []
    for length in range(1, longest + 1):
        counts, step = {}, []
        for g in range(groups):
            if over[g]:
                continue
            rows = scores([text for text, _, _ in beams[g]])
            candidates = [
                (objective + row[v] - diversity * counts.get(v, 0), (*text, v), total + row[v])
                for (text, objective, total), row in zip(beams[g], rows)
                for v in range(len(row))
                if row[v] > -np.inf
            ]
            candidates.sort(key=lambda one: -one[0])
            ended = [one for one in candidates[:size] if one[1][-1] in ends]
            going = [one for one in candidates if one[1][-1] not in ends][:size]
            finished = candidates[:size] if length == longest else ended
            kept[g] = complete(
                kept[g] + [Found(text, objective, total, g) for objective, text, total in finished],
                size,
                penalty,
            )
            step.append([text[-1] for _, text, _ in going])
            for _, text, _ in ended + going:
                counts[text[-1]] = counts.get(text[-1], 0) + 1
            beams[g] = [(text, objective, total) for objective, text, total in going]
            if not going or length == longest:
                over[g] = True
            elif len(kept[g]) == size:
                worst = min(one.objective / len(one.tokens) ** penalty for one in kept[g])
                reach = longest if early == "never" and penalty > 0 else length
                over[g] = early is True or not going[0][0] / reach**penalty > worst
        taken.append(step)
        if all(over):
            break
    texts = [one for group in kept for one in group]
    return sorted(texts, key=lambda one: -one.logprob / len(one.tokens) ** penalty), taken
