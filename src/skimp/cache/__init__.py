"""What a model remembers: who owns which bytes, for how long, and who may read them again.

::

    layout = CacheLayout.from_specs([spec_of_layer_0, ...])    # layers with equal specs: a group
    arena = Arena(layout, budget_bytes, device)                # allocated once, never exceeded
    cache = CacheManager(layout, arena)
    seq = cache.open(prompt)                # seq.length tokens of it are cached already
    tables = BlockTables([np.zeros((S, width), np.int32) for _ in layout.groups])

    cache.append(seq, n)                    # reserve room for n tokens; False: no room
    tables.update([seq])                    # where the forward finds and writes them
    ...                                     # a forward writes positions [length, length + n)
    cache.commit(seq, k, ids)               # the first k of them stay, the others are rolled back

    cache.close(seq)

Rules

* ``append`` then ``commit`` is the only way in, for prompts, generation, speculation and blocks
  alike. One append may be open a sequence, and ``extend`` may lengthen it before the forward out of
  what is free; the forward may write only the positions that were reserved.
* Block tables are written after the last ``append`` of a step: any append may move pages of any
  sequence (compaction), and a commit may replace a page by an equal one that was there first.
* The address of a page is its byte offset / 64; 0 is no page. A query at position p of a group
  with horizon h reads positions > p - h and < its end; pages out of reach are 0 and not read.
  Unwritten positions hold arbitrary bytes: mask scores, do not multiply by zero.
* A page belongs to its owners by reference count: sequences that list it and the prefix tree.
  Nobody writes a page with two owners (copy on write), and a registered page is never written.
* An ``append`` that returns False leaves everything as it was. What ``fits`` admits can always
  finish once the others are preempted; what it does not admit must be refused.
* Sequences are changed through the manager only. Nothing here is thread-safe.

A kind of memory enters as a ``CacheSpec`` and a ``Policy`` (``layout.py``); latents and quantized
pages differ from keys and values only in ``bytes_per_token`` and in how a kernel reads a page.
"""

from skimp.cache.arena import MOST_BYTES, Arena, GroupUse
from skimp.cache.layout import CacheGroup, CacheLayout
from skimp.cache.manager import BlockTables, CacheManager, CacheSequence, CacheStats
from skimp.cache.prefix import PrefixStats
from skimp.cache.spec import CacheSpec

__all__ = [
    "MOST_BYTES",
    "Arena",
    "BlockTables",
    "CacheGroup",
    "CacheLayout",
    "CacheManager",
    "CacheSequence",
    "CacheSpec",
    "CacheStats",
    "GroupUse",
    "PrefixStats",
]
