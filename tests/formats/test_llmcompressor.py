"""Checkpoints of llmcompressor (see ``fixtures/make.py``) answer as in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from skimp.kernels.plain import PlainOps
from skimp.model.loading import load_decoder, load_spec
from skimp.model.saving import module_tensors, save_checkpoint
from skimp.shrink.capture import whole_text

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = {
    "w4a16": "int4-g128",
    "w4a16_asym": "int4-g128-asym",
    "w8a8": "int8-a8",
    "fp8_dynamic": "fp8-afp8",
}


@pytest.mark.parametrize("name", NAMES)
def test_same_logits(name: str) -> None:
    expected = load_file(FIXTURES / name / "expected.safetensors")
    decoder = load_decoder(FIXTURES / name, dtype="float32")
    assert {form.name for form in decoder.spec.formats.values()} == {NAMES[name]}
    assert len(decoder.spec.formats) == 14
    ops = PlainOps()
    with torch.no_grad():
        ours = decoder.bind(ops)(whole_text(expected["ids"]), ops)
    theirs = expected["logits"]
    error = (ours - theirs).norm() / theirs.norm()
    assert error < (1e-2 if decoder.spec.formats["layers.0.ffn.up_proj"].activations else 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_written_again_it_is_the_same(name: str, tmp_path: Path) -> None:
    decoder = load_decoder(FIXTURES / name)
    again = save_checkpoint(tmp_path / "again", decoder.spec, module_tensors(decoder))
    assert load_spec(again) == load_spec(FIXTURES / name)
    theirs = load_file(FIXTURES / name / "model.safetensors")
    ours = load_file(again / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert tensor.dtype == ours[key].dtype, key
        assert torch.equal(tensor.view(torch.uint8), ours[key].view(torch.uint8)), key
