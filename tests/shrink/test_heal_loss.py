"""The chunked loss against the one that holds all logits, and sequences side by side."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from shrink.drive import logits
from tiny_models import VOCAB, tiny_decoder, tiny_spec
from torch import Tensor

from skimp.kernels.plain import PlainOps
from skimp.model.decoder import Decoder
from skimp.model.spec import ModelSpec
from skimp.shrink.heal.data import step_inputs
from skimp.shrink.heal.loss import divergence, teacher_logits

CPU = torch.device("cpu")


def _spec(tied: bool, softcap: float | None) -> ModelSpec:
    spec = tiny_spec((None, 5))
    return dataclasses.replace(spec, tie_embeddings=tied, logit_softcap=softcap)


def _pair(spec: ModelSpec) -> tuple[Decoder, Decoder]:
    student, teacher = (tiny_decoder(spec, seed=seed) for seed in (0, 1))
    for parameter in student.parameters():
        parameter.requires_grad_()
    return student, teacher


def _documents(*lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(1, VOCAB, length).astype(np.int32) for length in lengths]


def _naive(student: Tensor, teacher: Tensor) -> Tensor:
    log_p = teacher.log_softmax(-1)
    return (log_p.exp() * (log_p - student.log_softmax(-1))).sum()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_loss_and_gradients_are_the_naive_ones(
    tied: bool, softcap: float | None, chunk: int
) -> None:
    student, teacher = _pair(_spec(tied, softcap))
    ops = PlainOps()
    inputs = step_inputs(_documents(9, 1, 14), CPU)
    for decoder in (student, teacher):
        decoder.bind(ops, max_positions=32)
    with torch.no_grad():
        right = teacher(inputs, ops)
    expected = _naive(student(inputs, ops), right)
    (expected / 24).backward()
    wanted = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    assert set(wanted) == set(dict(student.named_parameters()))
    student.zero_grad()

    found = divergence(
        student.states(inputs, ops), student, teacher_logits(teacher, inputs, ops), chunk=chunk
    )
    (found / 24).backward()
    assert float(found.detach()) > 1.0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in student.named_parameters():
        spread = float(wanted[name].abs().max())
        torch.testing.assert_close(
            parameter.grad, wanted[name], rtol=1e-4, atol=1e-5 * spread, msg=name
        )


def test_no_gradient_for_what_is_frozen() -> None:
    student, teacher = _pair(_spec(tied=False, softcap=None))
    ops = PlainOps()
    inputs = step_inputs(_documents(12), CPU)
    student.lm_head.weight.requires_grad_(False)
    for decoder in (student, teacher):
        decoder.bind(ops, max_positions=32)
    logits_of = teacher_logits(teacher, inputs, ops)
    divergence(student.states(inputs, ops), student, logits_of).backward()
    assert student.lm_head.weight.grad is None and student.norm.weight.grad is not None


def test_tokens_the_original_rules_out() -> None:
    """Minus infinity in the teacher's logits, and in the student's, is no NaN."""
    student, _ = _pair(_spec(tied=False, softcap=None))
    x = torch.randn(3, 64, requires_grad=True)
    right = torch.randn(3, VOCAB)
    right[:, 5] = -torch.inf
    found = divergence(x, student, lambda first, last: right[first:last].clone())
    found.backward()
    assert found.isfinite() and x.grad is not None and x.grad.isfinite().all()


def test_a_model_and_itself_are_zero_apart() -> None:
    student, _ = _pair(_spec(tied=True, softcap=None))
    ops = PlainOps()
    inputs = step_inputs(_documents(20, 6), CPU)
    student.bind(ops, max_positions=32)
    found = divergence(
        student.states(inputs, ops), student, teacher_logits(student, inputs, ops), chunk=8
    )
    found.backward()
    assert float(found.detach()) == 0.0
    assert all(not p.grad.any() for p in student.parameters() if p.grad is not None)


def test_logits_never_exist_whole() -> None:
    """No tensor of a loss over many rows has as many numbers as their logits would."""
    student, teacher = _pair(_spec(tied=True, softcap=None))
    ops = PlainOps()
    inputs = step_inputs(_documents(*[50] * 12), CPU)
    for decoder in (student, teacher):
        decoder.bind(ops, max_positions=64)
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor):
                    biggest = max(biggest, tensor.numel())
            return out

    with Watch():
        logits_of = teacher_logits(teacher, inputs, ops)
        divergence(student.states(inputs, ops), student, logits_of, chunk=32).backward()
    assert 32 * VOCAB <= biggest < 600 * VOCAB


@pytest.mark.parametrize("windows", [(None, None), (5, None), (300, 7)])
def test_a_document_sees_itself_alone(windows: tuple[int | None, ...]) -> None:
    """Side by side or each for itself: the same logits."""
    decoder = tiny_decoder(tiny_spec(windows))
    docs = _documents(1, 40, 17, 320, 2)
    ops = PlainOps()
    decoder.bind(ops, max_positions=512)
    with torch.no_grad():
        together = decoder(step_inputs(docs, CPU), ops).split([len(doc) for doc in docs])
    for doc, found in zip(docs, together):
        alone = logits(decoder, doc.tolist())
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-5 * float(alone.std()))


@pytest.mark.parametrize("window", [None, 1, 7, 64, 300])
def test_fused_attention_is_the_written_out_one(window: int | None) -> None:
    """Values and gradients, with fewer key-value heads, against scores of the whole square (which
    a softcap that bends nothing asks for)."""
    decoder = tiny_decoder(tiny_spec((window,)))
    spec = dataclasses.replace(decoder.spec.layers[0].mixer, softcap=1e9)
    inputs = step_inputs(_documents(3, 310, 40), CPU)
    ops = PlainOps()
    decoder.bind(ops, max_positions=512)
    params = decoder.layers[0].mixer._params
    width = spec.q_dim + 2 * spec.kv_dim
    qkv = torch.randn(353, width, generator=torch.Generator().manual_seed(0))
    found, wanted = (qkv.clone().requires_grad_() for _ in range(2))
    a = ops.attention(found, params, inputs)
    b = ops.attention(wanted, dataclasses.replace(params, spec=spec), inputs)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    pull = torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    for out in (a, b):
        (out * pull).sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-4)
