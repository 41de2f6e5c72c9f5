"""Unrolled rows against a head that guesses one row at a time, with a cache, as in serving."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from draft.heads import tiny_head
from tiny_models import VOCAB, tiny_decoder, tiny_spec, with_latents
from torch import Tensor

from skimp.draft.unroll import UnrolledOps, fused, head_rows, taps_and_states, unroll
from skimp.kernels.ops import LayerCache, StepInputs
from skimp.kernels.plain import PlainOps
from skimp.model.decoder import Decoder
from skimp.model.draft_head import DraftHead
from skimp.shrink.heal.data import step_inputs

STEPS = 4
PAGE = 256
SCALE = 3.0  # of embeddings


def _documents(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, VOCAB, size=n).astype(np.int32) for n in lengths]


def _bound(decoder: Decoder, head: DraftHead, ops: PlainOps, cache: LayerCache | None) -> None:
    head.fusion.bind(ops)
    table = ops.pack((decoder.embed_tokens,), "table")
    head.attach(table, SCALE)
    head.bind(ops, caches=None if cache is None else [cache])


def _one_by_one(
    decoder: Decoder, head: DraftHead, doc: np.ndarray
) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """(stream, logits) of (row, step): for each row the target's features up to it are read into
    the cache, then the head goes on from its own streams."""
    ops = PlainOps()
    (spec,) = head.cache_specs(torch.float32)
    cache = LayerCache(spec=spec, group=0, offset=0, page_tokens=PAGE)
    _bound(decoder, head, ops, cache)
    arena = torch.zeros(64 + PAGE * spec.bytes_per_token, dtype=torch.uint8)
    whole = step_inputs([doc], torch.device("cpu"))
    x_RD = decoder.embed(whole, ops)
    features = None
    for index, layer in enumerate(decoder.layers):
        features = head.fusion.add(index, x_RD, features, ops)
        x_RD = layer(x_RD, ops, whole)
    assert features is not None

    def rows(first: int, tokens: np.ndarray, features: Tensor) -> tuple[Tensor, Tensor]:
        """Rows ``first`` .. of the document, at slots that begin with the first row's."""
        slots = torch.arange(first - 1, first - 1 + len(tokens), dtype=torch.int32)
        step = StepInputs(
            token_ids=torch.from_numpy(tokens),
            positions=slots,
            row_seq=torch.zeros_like(slots),
            kv_end=slots + 1,
            seq_starts=torch.tensor([0, len(tokens)], dtype=torch.int32),
            logit_rows=torch.tensor([len(tokens) - 1], dtype=torch.int32),
            arena=arena,
            block_tables=(torch.ones(1, 1, dtype=torch.int32),),
            features=features,
        )
        logits = head(step, ops)
        assert head.features is not None
        return head.features[-1:], logits[0]

    found = {}
    for row in range(1, len(doc)):
        stream, logits = rows(1, doc[1 : row + 1], features[:row])
        found[row, 0] = stream[0], logits
        for step in range(1, min(STEPS, len(doc) - row)):
            at = row + step
            stream, logits = rows(at, doc[at : at + 1], stream)
            found[row, step] = stream[0], logits
    return found


@pytest.mark.parametrize("latent", [False, True], ids=["heads", "latents"])
def test_unrolled_is_one_by_one(latent: bool) -> None:
    spec = with_latents(tiny_spec(), 20) if latent else tiny_spec()
    decoder = tiny_decoder(spec)
    decoder.bind(PlainOps())
    head = tiny_head(spec)
    docs = _documents(3, 1, 40, 2, 37, 150)
    ops = UnrolledOps()
    _bound(decoder, head, ops, None)
    with torch.no_grad():
        step = step_inputs(docs, torch.device("cpu"))
        tapped, states = taps_and_states(decoder, head.spec.taps, step, PlainOps())
        assert torch.equal(states, decoder.states(step, PlainOps()))
        at = head_rows(step.seq_starts.tolist())
        features = fused(head.fusion, tapped, torch.from_numpy(at.rows - 1), ops)
        streams = unroll(head, ops, step, at, features, STEPS)
        first = 0
        compared = 0
        for doc in docs:
            if doc is docs[-1]:
                doc = doc[:140]  # enough to cross a block of queries
            expected = _one_by_one(decoder, head, doc)
            for (row, index), (stream, logits) in expected.items():
                place = int(np.flatnonzero(at.rows == first + row)[0])
                assert at.within(index)[place]
                own = streams[index][place]
                size = float(stream.abs().max())
                torch.testing.assert_close(own, stream, rtol=1e-5, atol=1e-5 * size)
                last = dataclasses.replace(step, logit_rows=torch.tensor([0], dtype=torch.int32))
                found = ops.logits(own[None], head._head, head.norm, None, last)[0]
                size = float(logits.abs().max())
                torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5 * size)
                compared += 1
            first += len(doc)
    assert compared > 700


def test_rows_within_their_documents() -> None:
    at = head_rows([0, 3, 4, 4, 6])
    assert at.rows.tolist() == [1, 2, 5] and at.ends.tolist() == [3, 3, 6]
    assert at.starts == (0, 2, 3)
    assert [at.within(step).tolist() for step in range(2)] == [[True] * 3, [True, False, False]]


def test_gradients_reach_every_parameter() -> None:
    """And are the slopes that differences give."""
    decoder = tiny_decoder()
    decoder.bind(PlainOps())
    head = tiny_head(decoder.spec)
    ops = UnrolledOps()
    _bound(decoder, head, ops, None)
    step = step_inputs(_documents(9, 6), torch.device("cpu"))
    tapped, _ = taps_and_states(decoder, head.spec.taps, step, PlainOps())
    at = head_rows(step.seq_starts.tolist())
    before = torch.from_numpy(at.rows - 1)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(len(at.rows), 64, generator=generator) for _ in range(3)]

    def value() -> Tensor:
        features = fused(head.fusion, tapped, before, ops)
        streams = unroll(head, ops, step, at, features, 3)
        return sum((s * w).sum() for s, w in zip(streams, weights))  # type: ignore[return-value]

    unused = {"norm.weight", "lm_head.weight"}
    for parameter in head.parameters():
        parameter.requires_grad_()
    value().backward()
    for name, parameter in head.named_parameters():
        if name in unused:
            continue
        grad = parameter.grad
        assert grad is not None and bool(grad.any()), name
        turn = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            kept = parameter.detach().clone()
            ends = []
            for sign in (1, -1):
                parameter.copy_(kept + sign * 1e-3 * turn)
                ends.append(float(value()))
            parameter.copy_(kept)
        slope = (ends[0] - ends[1]) / 2e-3
        assert slope == pytest.approx(float((grad * turn).sum()), rel=0.02, abs=0.5), name
