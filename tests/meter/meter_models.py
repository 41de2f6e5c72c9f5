"""Engines around tiny random models that read bytes, for the meter's tests."""

from __future__ import annotations

import torch
from tiny_models import tiny_decoder, tiny_spec

from skimp.engine import Engine, EngineOptions
from skimp.kernels.ops import StepInputs
from skimp.kernels.plain import PlainOps
from skimp.model.decoder import Decoder


class Bytes:
    """A token a byte, shifted by one: 0 is the end token, which nothing is framed with."""

    eos_ids = (0,)

    def encode(self, text: str, **options: bool) -> list[int]:
        return [b + 1 for b in text.encode()]

    encode_plain = encode

    def decode(self, ids: list[int], **options: object) -> str:
        return bytes(i - 1 for i in ids if 1 <= i <= 256).decode(errors="replace")

    def detokenizer(self, **options: object) -> ByteStream:
        return ByteStream()


class ByteStream:
    def push(self, token: int) -> str:
        return chr(token - 1) if 1 <= token <= 128 else "?"

    def flush(self) -> str:
        return ""


def noisy_decoder(noise: float = 0.0, seed: int = 0) -> Decoder:
    """The tiny decoder with every matrix moved by ``noise`` of its spread."""
    decoder = tiny_decoder(tiny_spec((None, 24)), seed=7)
    generator = torch.Generator().manual_seed(seed)
    for parameter in decoder.parameters():
        if parameter.dim() == 2 and noise:
            moved = torch.randn(parameter.shape, generator=generator) * parameter.std() * noise
            parameter.data.add_(moved)
    return decoder


def tiny_engine(noise: float = 0.0, **options: object) -> Engine:
    chosen: dict[str, object] = {"max_batch": 8, "max_context": 256, "token_budget": 96}
    return Engine(noisy_decoder(noise), Bytes(), EngineOptions(**{**chosen, **options}))


def plain_logits(decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    """Logits float64 [T, V] of one forward without a cache, no engine involved."""
    ops = PlainOps()
    count = len(tokens)
    positions = torch.arange(count, dtype=torch.int32)
    step = StepInputs(
        token_ids=torch.tensor(tokens, dtype=torch.int32),
        positions=positions,
        row_seq=torch.zeros(count, dtype=torch.int32),
        kv_end=positions + 1,
        seq_starts=torch.tensor([0, count]),
        logit_rows=positions,
    )
    with torch.no_grad():
        logits: torch.Tensor = decoder.bind(ops)(step, ops)
    return logits.double()
