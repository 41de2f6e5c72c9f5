"""Random lives of sequences against recomputation from scratch."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from fake_model import TABLE_ROWS, Text, World, phrase, spec

LIVES = 100  # per seed; 20 seeds


def few_values(parent: int, tokens: bytes) -> int:
    return hash((parent, tokens)) % 3


def constant(parent: int, tokens: bytes) -> int:
    return 7


def random_world(rng: random.Random) -> World:
    horizons = [rng.choice((None, None, 1, 2, 3, 5, 8, 13)) for _ in range(rng.randint(1, 4))]
    page_tokens = rng.choice((1, 2, 3, 4, 8))
    specs = [spec(h, rng.choice(("kv", "other"))) for h in horizons]
    layer_bytes = -(-page_tokens * 16 // 64) * 64
    chunk = layer_bytes * len(specs) * rng.choice((1, 2, 3, 5, 8))
    pick = rng.random()
    hasher = constant if pick < 0.1 else few_values if pick < 0.2 else None
    return World(
        specs,
        page_tokens=page_tokens,
        budget=chunk * rng.randint(len(specs), rng.choice((6, 12, 24))) + 128,
        chunk_bytes=chunk,
        prefix=rng.random() < 0.9,
        **({} if hasher is None else {"hasher": hasher}),
    )


def step(world: World, rng: random.Random, seen: Counter[str]) -> None:
    """One forward over a random part of the batch, then random acceptance."""
    batch = []
    for text in rng.sample(world.texts, min(len(world.texts), rng.randint(1, 4))):
        known = text.tokens[text.cache.length :]
        n = rng.choice((1, 1, 1, 2, 5, 11))
        if text.cache.length + n > 60:
            continue
        if world.append(text, (known + phrase(rng, n))[:n]):
            batch.append(text)
            more = rng.randint(1, 7)
            if rng.random() < 0.3 and text.cache.length + n + more <= 60 and len(known) <= n:
                room = world.extend(text, phrase(rng, more))
                seen["extended"] += room == more
                seen["cut"] += room < more
        else:
            seen["refused"] += 1
    if rng.random() < 0.1 and batch:
        world.close(batch.pop())  # a client left between append and forward
    world.audit()
    world.forward(batch)
    for text in batch:
        n = text.cache.pending
        k = n if rng.random() < 0.7 else rng.randint(0, n)
        seen["rolled back"] += n - k
        prompt = text.tokens[text.cache.length + k :]
        world.commit(text, k)
        if rng.random() < 0.3 and text.cache.length + len(prompt) < 60:
            text.tokens += prompt  # known tokens ahead of the cache, as in a chunked prefill
        world.audit()


def live(world: World, rng: random.Random, seen: Counter[str]) -> None:
    stems = [phrase(rng, 30) for _ in range(2)]
    parked: list[Text] = []
    for _ in range(rng.randint(10, 60)):
        action = rng.choices(
            ("open", "step", "fork", "close", "preempt", "resume", "forget"),
            (4, 12, 1, 1, 1, 2, 0.2),
        )[0]
        room = len(world.texts) < TABLE_ROWS
        if action == "open" and room:
            prompt = rng.choice(stems)[: rng.randint(0, 30)] + phrase(rng, rng.randint(1, 6))
            text = world.open(prompt, rng.choice((None, None, "tenant")))
            seen["reused"] += text.cache.length > 0
        elif action == "resume" and parked and room:
            old = parked.pop()
            seen["resumed"] += world.open(old.tokens, old.salt).cache.length > 0
        elif action == "forget":
            world.cache.clear_prefix()
        elif world.texts:
            text = rng.choice(world.texts)
            if action == "step":
                step(world, rng, seen)
            elif action == "fork" and room:
                world.fork(text)
                seen["forked"] += 1
            elif action == "close":
                world.close(text)
            elif action == "preempt":
                parked.append(text)
                world.close(text)
        world.audit()
    stats = world.cache.stats()
    if stats.prefix is not None:
        seen["evicted"] += stats.prefix.pages_evicted
        seen["collided"] += stats.prefix.collisions
    for text in list(world.texts):
        world.close(text)
        world.audit()
    world.cache.clear_prefix()
    world.audit()
    assert not world.arena.refs, "pages leaked"
    assert world.arena.free_chunks == len(world.arena.chunks), "chunks did not come back"


@pytest.mark.parametrize("seed", range(20))
def test_random_lives(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    for _ in range(LIVES):
        world = random_world(rng)
        compact = world.arena.compact

        def counted(needs: list[int], compact=compact) -> dict[int, int]:
            moved = compact(needs)
            seen["moved"] += len(moved)
            return moved

        monkeypatch.setattr(world.arena, "compact", counted)
        live(world, rng, seen)
    # The lives must have met what they are meant to test.
    met = (
        "refused",
        "rolled back",
        "extended",
        "cut",
        "reused",
        "resumed",
        "forked",
        "evicted",
        "collided",
    )
    for event in met:
        assert seen[event] > 5, f"{event}: {seen}"
    assert seen["moved"], seen
