"""From what each layer remembers to pages: which layers share a page, how big it is, where in it
a layer's share lies, and how far back from a boundary a page is still needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from skimp.cache.spec import CacheSpec

if TYPE_CHECKING:
    from skimp.kernels.ops import LayerCache

ALIGN = 64  # bytes; page addresses count in this unit
OVERHEAD = 2 * ALIGN  # of an arena: to align its base, and so that address 0 is no page
_MAX_CHUNKS = 4096  # enough for fine sharing, few enough to keep the bookkeeping small


class Policy(Protocol):
    """What differs between kinds of memory. The sequence, the prefix tree and the planner ask
    these questions and never look at the spec's kind themselves.

    * May a prompt resume at a boundary, which pages does a sequence there hold (its lock), and
      which may go? All three follow from ``first_needed``: the pages from that position up to the
      boundary, no more and no fewer.
    * Does anything behind a page die with it? ``anchors`` says so; it decides what may be evicted
      from the middle of a prefix.
    """

    @property
    def anchors(self) -> bool:
        """True if no longer prefix can be resumed without this page, so eviction takes the end
        of a prefix first; False if a page may go from the middle."""
        ...

    def first_needed(self, length: int) -> int:
        """First position that a query at position ``length`` or later can see."""
        ...

    def max_tokens(self, length: int, step: int) -> int:
        """Most positions needed at once while a sequence grows to ``length`` tokens in steps of
        at most ``step``."""
        ...


@dataclass(frozen=True)
class Full:
    """The whole past is read."""

    anchors = True

    def first_needed(self, length: int) -> int:
        return 0

    def max_tokens(self, length: int, step: int) -> int:
        return length


@dataclass(frozen=True)
class Window:
    """A query at position p sees positions > p - horizon."""

    horizon: int
    anchors = False

    def first_needed(self, length: int) -> int:
        return max(0, length - self.horizon + 1)

    def max_tokens(self, length: int, step: int) -> int:
        return min(length, self.horizon - 1 + step)


def policy_for(spec: CacheSpec) -> Policy:
    """The policy of a spec. Raises ValueError for a spec that no policy serves."""
    if spec.atomic or spec.bytes_per_sequence:
        raise ValueError(
            f"cache spec of kind {spec.kind!r} has atomic={spec.atomic}, bytes_per_sequence="
            f"{spec.bytes_per_sequence}: recurrent states are not served by the paged cache yet"
        )
    if spec.horizon is None:
        return Full()
    if spec.horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {spec.horizon}")
    return Window(spec.horizon)


@dataclass(frozen=True, kw_only=True)
class CacheGroup:
    """Layers with equal specs. They share one block table; a page holds ``page_tokens`` tokens of
    every layer of the group, one layer's share after another."""

    index: int
    spec: CacheSpec
    layers: tuple[int, ...]
    page_tokens: int
    policy: Policy

    @property
    def layer_bytes(self) -> int:
        """One layer's share of a page in bytes, rounded up to 64."""
        return -(-self.spec.bytes_per_token * self.page_tokens // ALIGN) * ALIGN

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: all layers of the group, ``page_tokens`` tokens."""
        return self.layer_bytes * len(self.layers)

    def first_page(self, length: int) -> int:
        """Index of the first page that a sequence of ``length`` tokens still needs."""
        return self.policy.first_needed(length) // self.page_tokens

    def max_pages(self, length: int, step: int = 1) -> int:
        """Most pages one sequence holds at once while it grows to ``length`` tokens in steps of
        at most ``step``."""
        tokens = self.policy.max_tokens(length, step)
        pages = -(-length // self.page_tokens)
        if tokens >= length:
            return pages
        # Reach is reviewed when a page fills, so up to page_tokens - 1 tokens of lag; the latest
        # position may be the first or the last of its page.
        lag = self.page_tokens - 1
        return min(
            pages,
            -(-(tokens - step) // self.page_tokens) + (lag + step - 1) // self.page_tokens + 1,
        )


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """How the layers of one model lie in pages."""

    groups: tuple[CacheGroup, ...]
    page_tokens: int
    _place: tuple[tuple[int, int], ...] = field(repr=False)  # per layer: group, rank in it
    _recent: tuple[tuple[int, int] | None, ...] = field(repr=False)  # of its newest tokens

    @classmethod
    def from_specs(cls, specs: Sequence[CacheSpec], page_tokens: int = 16) -> CacheLayout:
        """Group layers with equal specs; ``specs`` has one entry per layer, in order. What a
        layer keeps of its newest tokens (``CacheSpec.recent``) is a member of a group by itself.

        Raises ValueError for no layers, page_tokens < 1, or a spec that cannot be paged.
        """
        if not specs:
            raise ValueError("specs is empty: a cache needs at least one layer")
        if page_tokens < 1:
            raise ValueError(f"page_tokens must be at least 1, got {page_tokens}")
        members: dict[CacheSpec, list[int]] = {}

        def join(layer: int, spec: CacheSpec) -> tuple[int, int]:
            if spec.bytes_per_token < 1:
                raise ValueError(f"layer {layer}: bytes_per_token is {spec.bytes_per_token}")
            layers = members.setdefault(spec, [])
            layers.append(layer)
            return list(members).index(spec), len(layers) - 1

        place: list[tuple[int, int]] = []
        recent: list[tuple[int, int] | None] = []
        for layer, spec in enumerate(specs):
            place.append(join(layer, replace(spec, recent=None)))
            recent.append(None if spec.recent is None else join(layer, spec.recent))
        groups = tuple(
            CacheGroup(
                index=i,
                spec=spec,
                layers=tuple(layers),
                page_tokens=page_tokens,
                policy=policy_for(spec),
            )
            for i, (spec, layers) in enumerate(members.items())
        )
        return cls(
            groups=groups, page_tokens=page_tokens, _place=tuple(place), _recent=tuple(recent)
        )

    def layer_cache(self, layer: int) -> LayerCache:
        """Where a layer's share of its group's page lies, and that of its newest tokens."""
        # Imported here because the kernel interface itself imports this package's spec.
        from skimp.kernels.ops import LayerCache

        def at(place: tuple[int, int], recent: LayerCache | None) -> LayerCache:
            index, rank = place
            group = self.groups[index]
            return LayerCache(
                spec=group.spec,
                group=index,
                offset=rank * group.layer_bytes,
                page_tokens=group.page_tokens,
                recent=recent,
            )

        newest = self._recent[layer]
        return at(self._place[layer], None if newest is None else at(newest, None))

    def pages_needed(self, length: int, step: int = 1) -> tuple[int, ...]:
        """Per group, the most pages one sequence holds at once while it grows to ``length``
        tokens, at most ``step`` appended at a time."""
        return tuple(group.max_pages(length, step) for group in self.groups)

    def bytes_held(self, length: int) -> int:
        """Bytes of the pages that one sequence of ``length`` tokens holds as it generates: the most
        on its way there, as a window slides over page borders."""
        return sum(n * g.page_bytes for n, g in zip(self.pages_needed(length), self.groups))

    def bytes_needed(self, length: int, step: int = 1, sequences: int = 1) -> int:
        """An arena budget that holds ``sequences`` such sequences, nothing shared, in chunks of
        the size that :meth:`choose_chunk_bytes` gives."""
        pages = [sequences * n for n in self.pages_needed(length, step)]
        budget = OVERHEAD + sum(n * g.page_bytes for n, g in zip(pages, self.groups))
        while True:
            chunk = self.choose_chunk_bytes(budget)
            chunks = sum(-(-n // (chunk // g.page_bytes)) for n, g in zip(pages, self.groups))
            if OVERHEAD + chunks * chunk <= budget:
                return budget
            budget = OVERHEAD + chunks * chunk

    def choose_chunk_bytes(self, budget_bytes: int) -> int:
        """A chunk size that wastes little of an arena's budget: at the ends of chunks, at the
        end of the arena, and in chunks that a group holds but does not fill."""
        budget = budget_bytes - OVERHEAD
        sizes = [group.page_bytes for group in self.groups]
        floor = max(*sizes, budget // _MAX_CHUNKS, ALIGN)

        def usable(chunk: int) -> float:
            count = budget // chunk
            worst = min(count * (chunk // size) * size for size in sizes)
            return worst - (len(sizes) - 1) * chunk / 2

        candidates = {
            -(-floor // size) * size * factor for size in sizes for factor in range(1, 17)
        }
        # Every group may need a page at the same time.
        fitting = [chunk for chunk in candidates if chunk * len(sizes) <= budget]
        return max(fitting, key=lambda chunk: (usable(chunk), -chunk), default=max(sizes))
