"""Offline order by shared prefixes: BatchLLM (Zheng et al. 2024, arXiv 2412.03594).

An offline job's requests are all known, so sharing need not be left to the luck of an LRU cache: requests are
grouped by the prefix that they share, a group runs together, and its prefix is given up when its last member
ends. The paper's attention kernel, which reads a group's prefix once for all its members, is not part of this.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .policy import FirstCome

if TYPE_CHECKING:
    from ..pages import PageAllocator
    from ..scheduler import Sequence

ITEM = array("i").itemsize
# A sequence that was planned so often without starting goes before newcomers.
PATIENCE = 3


@dataclass(eq=False, slots=True)
class Node:
    """A prefix of `depth` blocks that texts share; `members` wait and end here, `alive` texts end here or below
    and have not ended."""

    depth: int
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    members: list[Sequence] = field(default_factory=list)
    alive: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """Requests that run together: they share the first `prefix` tokens, which `node` ends."""

    node: Node
    prefix: int
    members: list[Sequence]

    @property
    def prefill(self) -> int:
        """Tokens to compute when the prefix is computed once."""
        return self.prefix + sum(len(member.tokens) - self.prefix for member in self.members)


class PrefixTree:
    """The compact radix tree of texts, cut into blocks of `block` tokens, since only whole pages are shared. The
    last token of a text is always computed, so it is in no block. Texts of other roots (adapter, cache salt)
    share nothing.

    waiting: the sequences to be grouped. running: others that keep a prefix alive, but join no group.
    """

    def __init__(self, waiting: Iterable[Sequence], block: int, running: Iterable[Sequence] = ()):
        self.block, self.root = block, Node(0)
        self.node_of: dict[Sequence, Node] = {}
        texts: dict[object, list[tuple[bytes, int, Sequence, bool]]] = {}
        for sequences, waits in ((waiting, True), (running, False)):
            for sequence in sequences:
                text = texts.setdefault(sequence.chain.root, [])
                text.append((self._text(sequence.tokens), len(text), sequence, waits))
        for same_root in texts.values():
            same_root.sort(key=lambda one: one[:2])
            self._insert(same_root)
        self.nodes = self._parents_first()
        for node in reversed(self.nodes):
            if node.parent is not None:
                node.parent.alive += node.alive

    def _text(self, tokens: list[int]) -> bytes:
        return array("i", tokens[: (len(tokens) - 1) // self.block * self.block]).tobytes()

    def _insert(self, texts: list[tuple[bytes, int, Sequence, bool]]) -> None:
        """Grow the tree by sorted texts: each one's path leaves that of its predecessor where they differ."""
        size = self.block * ITEM
        path, before = [self.root], b""
        for text, _, sequence, waits in texts:
            shared, last = shared_blocks(before, text, size), None
            while path[-1].depth > shared:
                last = path.pop()
            if path[-1].depth < shared:
                assert last is not None
                path.append(_split(last, shared))
            if path[-1].depth * size < len(text):
                node = Node(len(text) // size, path[-1])
                path[-1].children.append(node)
                path.append(node)
            path[-1].alive += 1
            self.node_of[sequence] = path[-1]
            if waits:
                path[-1].members.append(sequence)
            before = text

    def _parents_first(self) -> list[Node]:
        found, stack = [], [self.root]
        while stack:
            found.append(stack.pop())
            stack.extend(found[-1].children)
        return found

    def flatten(self) -> list[Group]:
        """One level of sharing: each text joins the deepest prefix above it that was opened. Which ones are opened
        maximises the tokens that are reused (MaximizeReuse of the paper): a prefix of depth t with m members
        saves (m - 1) t. Texts that share nothing are groups of their own.

        Exact, by dynamic programming: the best of a subtree depends on what is above it only through the depth
        of the nearest open prefix, one of its ancestors'. O(nodes * height).
        """
        level: dict[Node, int] = {self.root: 0}
        for node in self.nodes[1:]:
            level[node] = level[_parent(node)] + 1
        # best[node][j]: reuse (blocks) below node when its ancestor of level j is the nearest open prefix.
        best = {node: [0] * (level[node] + 1) for node in self.nodes}
        opens: dict[Node, list[bool]] = {}
        for node in reversed(self.nodes[1:]):
            below, above, members = best.pop(node), best[_parent(node)], len(node.members)
            opened, path = node.depth * (members - 1) + below[-1], _depths(node)
            opens[node] = [opened > path[j] * members + below[j] for j in range(level[node])]
            for j, wins in enumerate(opens[node]):
                above[j] += opened if wins else path[j] * members + below[j]
        nearest, members_of = {self.root: self.root}, {self.root: list(self.root.members)}
        for node in self.nodes[1:]:
            outer = nearest[_parent(node)]
            nearest[node] = node if opens[node][level[outer]] else outer
            members_of.setdefault(nearest[node], []).extend(node.members)
        alone = members_of.pop(self.root)
        groups = [Group(node, node.depth * self.block, members) for node, members in members_of.items()]
        return groups + [Group(self.root, 0, [member]) for member in alone]


def _parent(node: Node) -> Node:
    assert node.parent is not None
    return node.parent


def _depths(node: Node) -> list[int]:
    """The depths of a node's ancestors, the root's first."""
    found: list[int] = []
    above = node.parent
    while above is not None:
        found.append(above.depth)
        above = above.parent
    return found[::-1]


def _split(node: Node, depth: int) -> Node:
    """Put a node of `depth` between `node` and its parent."""
    parent = _parent(node)
    middle = Node(depth, parent, [node])
    parent.children[parent.children.index(node)] = middle
    node.parent = middle
    return middle


def shared_blocks(a: bytes, b: bytes, size: int) -> int:
    """How many leading blocks of `size` bytes are equal."""
    low, high = 0, min(len(a), len(b)) // size
    while low < high:
        middle = (low + high + 1) // 2
        if a[low * size : middle * size] == b[low * size : middle * size]:
            low = middle
        else:
            high = middle - 1
    return low


def leave(node: Node) -> int:
    """A text that ends at `node` is done: from which block on no other living text goes the same way."""
    first, here = node.depth, node
    while True:
        here.alive -= 1
        if here.parent is None:
            return first
        if here.alive == 0:
            first = here.parent.depth
        here = here.parent


@dataclass(slots=True)
class Place:
    """What the policy notes on a sequence: its place in the tree, and how often it was planned."""

    node: Node | None = None
    plans: int = 0


class BatchLLM(FirstCome):
    """Groups of requests with one shared prefix, those first that decode much for what they prefill.

    A plan covers all that wait, and is worked off group by group: a group is admitted whole before the next
    starts, and its members find the prefix in the cache as soon as the step that computes it is scheduled.
    Requests that arrive later wait for the next plan, which is made when they outnumber the rest of this one;
    groups that run already, and sequences that were planned three times, come first then, so nobody starves. As
    completion order has nothing to do with arrival, it is meant for offline jobs.

    Memory, and not a number of requests, bounds what runs: a request is admitted beside others while the pages
    in use (a shared one counts once), its own, and one more a running sequence to grow into, stay below the
    threshold. Guessed lengths are not reserved; preemption remains, and takes no shared page from its other
    owners. A block that no unfinished request of the plan begins with is the next to be evicted, whenever it
    was used.

    Args:
        expected: the output tokens to expect of a sequence, to order groups by; None: all it may generate.
        threshold: share of the pool up to which requests are admitted.
    """

    def __init__(self, expected: Callable[[Sequence], float] | None = None, threshold: float = 0.9):
        if not 0 < threshold <= 1:
            raise ValueError(
                f"threshold={threshold!r} must be a share of the page pool, above 0 and at most 1"
            )
        super().__init__()
        self.expected, self.threshold = expected or (lambda one: one.limit - len(one.tokens)), threshold
        self._late: OrderedDict[Sequence, None] = OrderedDict()
        self.groups: list[Group] = []

    def suits(self, pages: PageAllocator) -> None:
        if not pages.sharing:
            raise ValueError(
                f"BatchLLM runs requests together that share a prefix, but the prefix cache is off ({pages.off}), "
                f"so nothing would be shared; leave prefix_cache=None (and change what turned it off), or choose "
                f"policy=SarathiServe()"
            )

    def __len__(self) -> int:
        return len(self._waiting) + len(self._late)

    def add(self, sequence: Sequence) -> None:
        self._late[sequence] = None
        sequence.rank = Place()

    def peek(self) -> Sequence | None:
        if self._late and len(self._late) >= len(self._waiting):
            self._plan()
        return super().peek()

    def discard(self, sequence: Sequence) -> None:
        if sequence in self._late:
            del self._late[sequence]
        else:
            super().discard(sequence)

    def admits(self, sequence: Sequence, pages: PageAllocator, running: list[Sequence]) -> bool:
        pool = pages.num_pages - 1
        fresh = pages.cost(sequence.chain, sequence.tokens, sequence.lookup)
        return pool - pages.free + fresh + len(running) + 1 <= self.threshold * pool

    def ended(self, sequence: Sequence, complete: bool) -> None:
        del complete
        if sequence.rank.node is not None:
            first = leave(sequence.rank.node)
            self.owner.pages.expire(sequence.chain.keys[first:])

    def _plan(self) -> None:
        """Put all that wait in order, preempted ones first."""
        returned = [one for one in self._waiting if one.epoch]
        fresh = [one for one in (*self._waiting, *self._late) if not one.epoch]
        tree = PrefixTree(fresh, self.owner.pages.page_size, running=[*returned, *self.owner.running])
        for sequence, node in tree.node_of.items():
            sequence.rank.node = node
            sequence.rank.plans += 1
        self.groups = sorted(tree.flatten(), key=self._urgency)
        self._waiting, self._late = OrderedDict.fromkeys(returned), OrderedDict()
        for group in self.groups:
            self._waiting.update(OrderedDict.fromkeys(sorted(group.members, key=lambda one: len(one.tokens))))

    def _urgency(self, group: Group) -> tuple[bool, bool, float]:
        old = any(member.rank.plans > PATIENCE for member in group.members)
        runs = group.prefix > 0 and group.node.alive > _waiting_below(group.node)
        return not old, not runs, -sum(map(self.expected, group.members)) / group.prefill


def _waiting_below(node: Node) -> int:
    """How many sequences wait at `node` and below."""
    count, stack = 0, [node]
    while stack:
        node = stack.pop()
        count += len(node.members)
        stack.extend(node.children)
    return count
