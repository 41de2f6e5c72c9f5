"""One tree of cached prefixes for all groups; what differs between groups is their policy.

A node stands for one complete page of tokens after its parent, under a salt (tenant, adapter:
whatever besides the tokens changes the content). It is looked up by chained hash and accepted only
if parent and tokens are the same, so a collision costs a miss and nothing else. For every group it
holds a page or nothing.

A page that only the tree owns is *idle*; idle pages are what eviction takes, least recently used
first. Sequences need no separate locks: the pages they reference are not idle. Whoever holds an
anchoring page of a node holds those of all its ancestors, and sequences let go of the deepest page
first, so the oldest idle anchoring page is always at the end of its branch.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from skimp.cache.arena import Arena
from skimp.cache.layout import CacheLayout

PageHash = Callable[[int, bytes], int]


def page_hash(parent: int, tokens: bytes) -> int:
    """Hash of a page of tokens chained to its parent's."""
    return hash((parent, tokens))


@dataclass(kw_only=True)
class PrefixStats:
    """Counts since the cache was made."""

    queries: int = 0
    hits: int = 0  # queries that reused at least one page
    tokens_asked: int = 0
    tokens_reused: int = 0
    pages_evicted: int = 0
    collisions: int = 0
    # Why a query reused nothing or less than is known of its tokens -> how often.
    reasons: Counter[str] = field(default_factory=Counter)


class Node:
    """One page of tokens in its context. Fields belong to :class:`PrefixTree`."""

    __slots__ = ("depth", "key", "pages", "parent", "pins", "tokens")

    def __init__(
        self, parent: Node | None, key: int, tokens: bytes, depth: int, pages: list[int]
    ) -> None:
        self.parent = parent
        self.key = key
        self.tokens = tokens
        self.depth = depth  # pages from the start of the sequence up to here
        self.pages = pages  # per group, 0: none
        self.pins = 0  # children, and sequences whose latest complete page this is


class PrefixTree:
    """Prefixes whose pages are kept in ``arena`` for reuse."""

    def __init__(self, layout: CacheLayout, arena: Arena, hasher: PageHash = page_hash) -> None:
        self.stats = PrefixStats()
        self._layout = layout
        self._arena = arena
        self._hash = hasher
        self._roots: dict[Hashable, Node] = {}
        self._salts: dict[Node, Hashable] = {}  # the same, backwards
        self._nodes: dict[int, Node] = {}
        self._owner: dict[int, tuple[Node, int]] = {}  # page -> who keeps it, for which group
        self._idle: list[OrderedDict[Node, int]] = [OrderedDict() for _ in layout.groups]
        self._clock = 0

    # -- sequences come and go ------------------------------------------------------------------

    def start(self, salt: Hashable) -> Node:
        """The root of a namespace, pinned for the caller."""
        root = self._roots.get(salt)
        if root is None:
            root = Node(None, hash(salt), b"", 0, [0] * len(self._layout.groups))
            self._roots[salt] = root
            self._salts[root] = salt
        root.pins += 1
        return root

    def unpin(self, node: Node) -> None:
        """A sequence no longer continues from ``node``."""
        node.pins -= 1
        self._prune(node)

    def match(self, root: Node, tokens: bytes, limit: int) -> tuple[Node, list[list[int]], str]:
        """Longest prefix of ``tokens`` (int32) of at most ``limit`` pages that every group can
        serve.

        Returns its last node, pinned in place of ``root``; per group the pages to continue from
        there (zeros for those out of reach), each with a reference for the caller; and, where
        that falls short of ``limit``, the reason in words.
        """
        size = 4 * self._layout.page_tokens
        groups = self._layout.groups
        path = [root]
        runs = [0] * len(groups)  # latest consecutive nodes that hold a page of the group
        best, blocked = 0, -1
        for depth in range(1, limit + 1):
            node = self._find(path[-1], tokens[(depth - 1) * size : depth * size])
            if node is None:
                break
            path.append(node)
            usable = True
            for g, group in enumerate(groups):
                runs[g] = runs[g] + 1 if node.pages[g] else 0
                if runs[g] < depth - group.first_page(depth * group.page_tokens):
                    usable, blocked = False, g
            if usable:
                best = depth
        reason = self._explain(best, len(path) - 1, limit, blocked)
        tables = []
        for g, group in enumerate(groups):
            first = group.first_page(best * group.page_tokens)
            pages = [node.pages[g] for node in path[first + 1 : best + 1]]
            for page in pages:
                self._take(page)
            tables.append([0] * first + pages)
        path[best].pins += 1
        self.unpin(root)
        return path[best], tables, reason

    def record(self, asked: int, reused: int, reason: str) -> None:
        """Count a match that was put to use (a request may be tried several times first)."""
        stats = self.stats
        stats.queries += 1
        stats.hits += reused > 0
        stats.tokens_asked += asked
        stats.tokens_reused += reused
        if reason:
            stats.reasons[reason] += 1

    def extend(self, parent: Node, tokens: bytes, pages: list[int]) -> Node | None:
        """Register a complete page that a sequence at ``parent`` holds; the pin moves along.

        Where the tree already has the same content it wins: the caller's page is released and
        its entry in ``pages`` replaced by the tree's, referenced for the caller. Returns None
        after a hash collision: the sequence is no longer registered, and ``parent`` is unpinned.
        """
        key = self._hash(parent.key, tokens)
        node = self._nodes.get(key)
        if node is None:
            node = Node(parent, key, tokens, parent.depth + 1, [0] * len(pages))
            self._nodes[key] = node
            parent.pins += 1
        elif node.parent is not parent or node.tokens != tokens:
            self.stats.collisions += 1
            self.unpin(parent)
            return None
        for g, page in enumerate(pages):
            known = node.pages[g]
            if known == page:
                continue
            if known:
                self._take(known)
                self._arena.release(page)
                pages[g] = known
            else:
                self._arena.retain(page)
                node.pages[g] = page
                self._owner[page] = (node, g)
        node.pins += 1
        self.unpin(parent)
        return node

    def release(self, page: int) -> None:
        """A sequence lets go of a page; if only the tree is left, the page becomes idle."""
        if self._arena.release(page) == 1 and page in self._owner:
            node, group = self._owner[page]
            self._clock += 1
            self._idle[group][node] = self._clock

    # -- eviction -------------------------------------------------------------------------------

    def idle_pages(self, group: int) -> int:
        """Pages of a group that eviction can free."""
        return len(self._idle[group])

    def evict(self, group: int) -> None:
        """Free at least one page, the most useful choice where ``group`` is short.

        A page that nothing depends on goes alone; an anchoring page takes its node along. Groups
        that can give up pages from the middle of a prefix do so before an anchor as old is lost.
        """
        idle = self._idle
        if idle[group] and not self._layout.groups[group].policy.anchors:
            victim = group
        else:
            victim = min(
                (g for g in range(len(idle)) if idle[g]),
                key=lambda g: next(iter(idle[g].values())),
            )
        node = next(iter(idle[victim]))
        if self._layout.groups[victim].policy.anchors:
            assert not node.pins, "an idle anchor has dependants"
            for g, page in enumerate(node.pages):
                if page:
                    self._drop(node, g)
        else:
            self._drop(node, victim)
        self._prune(node)

    def clear(self) -> None:
        """Evict every idle page."""
        for group in range(len(self._idle)):
            while self._idle[group]:
                self.evict(group)

    def rename(self, moved: dict[int, int]) -> None:
        """The arena moved pages: old address -> new."""
        entries = [(new, self._owner.pop(old)) for old, new in moved.items() if old in self._owner]
        for new, (node, group) in entries:
            node.pages[group] = new
            self._owner[new] = (node, group)

    # -- inside ---------------------------------------------------------------------------------

    def _find(self, parent: Node, tokens: bytes) -> Node | None:
        node = self._nodes.get(self._hash(parent.key, tokens))
        if node is not None and node.parent is parent and node.tokens == tokens:
            return node
        return None

    def _take(self, page: int) -> None:
        node, group = self._owner[page]
        self._idle[group].pop(node, None)
        self._arena.retain(page)

    def _drop(self, node: Node, group: int) -> None:
        page = node.pages[group]
        node.pages[group] = 0
        self._idle[group].pop(node, None)
        del self._owner[page]
        self._arena.release(page)
        self.stats.pages_evicted += 1

    def _prune(self, node: Node) -> None:
        """Forget a node that holds nothing and that nothing continues, and so up its branch."""
        while not node.pins and not any(node.pages):
            parent = node.parent
            if parent is None:
                del self._roots[self._salts.pop(node)]
                return
            del self._nodes[node.key]
            parent.pins -= 1
            node = parent

    def _explain(self, best: int, known: int, limit: int, blocked: int) -> str:
        if best == limit:
            return "" if limit else "prompt has no complete page before its last token"
        if known > best:
            return f"pages of cache group {blocked} within the window of the boundary were evicted"
        return "no cached page continues this prefix" if best else "no cached prefix"

    def nodes(self) -> Sequence[Node]:
        """Every node but the roots, for audits."""
        return list(self._nodes.values())

    def audit(self, ends: Counter[int]) -> None:
        """Check the tree against the arena. ``ends`` counts sequences per id of their node.

        Raises AssertionError on a mismatch.
        """
        children: Counter[int] = Counter()
        for node in self._nodes.values():
            assert node.parent is not None
            assert self._nodes.get(node.key) is node and node.depth == node.parent.depth + 1
            assert node.parent is self._nodes.get(node.parent.key) or not node.parent.depth
            children[id(node.parent)] += 1
        pins = children + ends
        held = 0
        for node in [*self._nodes.values(), *self._roots.values()]:
            assert node.pins == pins[id(node)], f"{node.pins} pins, {pins[id(node)]} found"
            assert node.pins or any(node.pages), "a node without use"
            for g, page in enumerate(node.pages):
                anchors = self._layout.groups[g].policy.anchors
                if not page:
                    assert not anchors or not node.depth, "a node lost its anchor"
                    continue
                held += 1
                assert self._owner[page] == (node, g) and self._arena.group_of(page) == g
                idle = node in self._idle[g]
                assert idle == (self._arena.refs[page] == 1), "idle list is wrong"
                if idle and anchors:
                    assert node.pins == children[id(node)], "an idle anchor is in use"
        assert held == len(self._owner) and len(self._roots) == len(self._salts)
        for group, idle_nodes in zip(self._layout.groups, self._idle):
            seen: set[int] = set()
            for node in idle_nodes:
                assert node.pages[group.index]
                if group.policy.anchors:
                    assert node.parent is not None and id(node.parent) not in seen
                    seen.add(id(node))
