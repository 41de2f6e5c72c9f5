"""The cache step changes the spec alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from pydantic import ValidationError
from shrink.drive import named, run_step
from tiny_models import tiny_decoder, tiny_spec

from skimp.errors import ShrinkError
from skimp.shrink.cache import Cache


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_only_the_spec_changes(format: str) -> None:
    spec, tensors = tiny_spec(), named(tiny_decoder())
    step = Cache.model_validate({"format": format})
    out_spec, out, _ = run_step(step, spec, tensors)
    assert out_spec == dataclasses.replace(spec, cache_format=format)
    assert set(out) == set(tensors)
    assert all(torch.equal(out[name], tensors[name]) for name in out)


def test_refusals() -> None:
    with pytest.raises(ValidationError, match="cache_dtype"):
        Cache.model_validate({"format": "int4"})
    with pytest.raises(ValidationError, match="format"):
        Cache.model_validate({})
    with pytest.raises(ValidationError, match="window"):
        Cache.model_validate({"format": "fp8", "window": 64})
    with pytest.raises(ShrinkError, match=r"^format: "):
        Cache(format="fp8").need(dataclasses.replace(tiny_spec(), cache_format="int8"))
