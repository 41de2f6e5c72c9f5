"""Weights arrive on a device as they were."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_decoder

from skimp.formats import WeightFormat, quantize
from skimp.model.moving import Pipeline, move_decoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(0, 4), (1,), (7, 13), (100, 33)])
def test_pieces_of_any_size(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    move = Pipeline(DEVICE, piece_bytes=256, pieces=2)
    tensors = [(torch.randn(shape) * 50).to(dtype) for _ in range(3)]
    moved = [move(tensor) for tensor in tensors]
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    for tensor, found in zip(tensors, moved):
        assert found.dtype == dtype and found.shape == tensor.shape
        assert torch.equal(found.cpu().view(torch.uint8), tensor.view(torch.uint8))


def test_a_part_of_a_larger_tensor() -> None:
    whole = torch.randn(20, 30)
    found = Pipeline(DEVICE, piece_bytes=64)(whole[:, 3:17])
    assert torch.equal(found.cpu(), whole[:, 3:17])


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_a_decoder_moves_as_it_is() -> None:
    decoder, twin = tiny_decoder(), tiny_decoder()
    for one in (decoder, twin):
        linear = one.layers[0].ffn.up_proj
        form = WeightFormat(kind="int", bits=4, group_size=32)
        linear.quantized, linear.weight = quantize(linear.weight.detach(), form), None
    move_decoder(decoder, "cuda")
    for (name, found), (_, wanted) in zip(
        decoder.named_parameters(), twin.named_parameters(), strict=True
    ):
        assert found.is_cuda and torch.equal(found.cpu(), wanted), name
    found, wanted = (d.layers[0].ffn.up_proj.quantized for d in (decoder, twin))
    assert found.values.is_cuda and torch.equal(found.dequantize().cpu(), wanted.dequantize())
