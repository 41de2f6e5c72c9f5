"""The methods on the embedded model: their order, and what is lost in the noise."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from shrink.drive import decoder_of, logits, named, run_step
from tokenizers import Tokenizer
from torch import Tensor

import skimp
from skimp.formats.weight import quantize
from skimp.model.loading import load_decoder
from skimp.model.spec import ModelSpec
from skimp.shrink.quantize import Quantize

ASSETS = Path(skimp.__file__).parent / "assets"
LENGTH = 256


def windows(file: str, count: int) -> Tensor:
    tokenizer = Tokenizer.from_file(str(ASSETS / "models/tales/tokenizer.json"))
    ids = tokenizer.encode((ASSETS / "text" / file).read_text()).ids
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


class Judge:
    """KL to the base in nats a token, and bits a token beyond it, window by window."""

    def __init__(self, spec: ModelSpec, tensors: dict[str, Tensor]) -> None:
        self.spec, self.texts = spec, windows("evaluation.txt", 12)
        self.base = self._log_probs(tensors)
        self.bits = torch.stack([self._bits(t, p) for t, p in zip(self.texts, self.base)])

    def _log_probs(self, tensors: dict[str, Any]) -> list[Tensor]:
        dense = {n: t.float() if isinstance(t, Tensor) else t for n, t in tensors.items()}
        decoder = decoder_of(dataclasses.replace(self.spec, formats={}), dense)
        return [logits(decoder, text.tolist()).log_softmax(-1) for text in self.texts]

    @staticmethod
    def _bits(text: Tensor, log_probs: Tensor) -> Tensor:
        return -log_probs[:-1].gather(1, text[1:, None]).mean() / math.log(2)

    def __call__(self, tensors: dict[str, Any]) -> tuple[float, Tensor]:
        found = self._log_probs(tensors)
        kl = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(self.base, found)]
        bits = torch.stack([self._bits(text, q) for text, q in zip(self.texts, found)])
        return sum(kl) / len(kl), bits - self.bits


def spread(values: Tensor) -> Tensor:
    """Standard error of the mean."""
    return values.std() / len(values) ** 0.5


@pytest.fixture(scope="module")
def tales() -> tuple[ModelSpec, dict[str, Tensor], Judge]:
    decoder = load_decoder(ASSETS / "models/tales")
    tensors = named(decoder)
    return decoder.spec, tensors, Judge(decoder.spec, tensors)


@pytest.mark.slow
def test_the_order_of_the_methods_at_int4(
    tales: tuple[ModelSpec, dict[str, Tensor], Judge],
) -> None:
    """GPTQ and AWQ, which look at inputs, lose less than HQQ, and HQQ less than rounding to
    nearest, with scales that cover the range and with searched ones."""
    spec, tensors, judge = tales
    text = windows("calibration.txt", 24)
    found: dict[str, float] = {}
    for symmetric, form in ((True, "int4"), (False, "int4-asym")):
        plain: dict[str, Any] = dict(tensors)
        for matrix, target in Quantize(format="int4", symmetric=symmetric).formats(spec).items():
            plain[f"{matrix}.weight"] = quantize(tensors[f"{matrix}.weight"], target)
        found[f"nearest {form}"] = judge(plain)[0]
        for method in ("rtn", "hqq", "gptq", "awq"):
            step = Quantize.model_validate(
                {"format": "int4", "method": method, "symmetric": symmetric}
            )
            _, out, run = run_step(step, spec, tensors, text)
            assert not run.notes
            found[f"{method} {form}"] = judge(out)[0]
    for name, kl in found.items():
        print(f"{name}: {kl:.4f} nats a token")
    for form in ("int4", "int4-asym"):
        measured = max(found[f"gptq {form}"], found[f"awq {form}"])
        assert measured < found[f"hqq {form}"] < found[f"rtn {form}"] < found[f"nearest {form}"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_eight_bits_are_lost_in_the_noise(
    form: str, tales: tuple[ModelSpec, dict[str, Tensor], Judge]
) -> None:
    """In that of the text: far less than a model's own bits differ from sample to sample. Window
    by window even such a small loss can be told from none."""
    spec, tensors, judge = tales
    _, out, _ = run_step(Quantize.model_validate({"format": form}), spec, tensors)
    kl, bits = judge(out)
    mean, error, noise = (float(x) for x in (bits.mean(), spread(bits), spread(judge.bits)))
    print(
        f"{form}: {kl:.5f} nats a token, {mean:+.5f} bits more, standard error {error:.5f}; "
        f"the base has {float(judge.bits.mean()):.4f} bits a token, standard error {noise:.4f}"
    )
    assert 0 < kl < 0.01
    assert abs(mean) < 0.25 * noise


@pytest.mark.slow
def test_mixed_precision_beats_uniform_formats(
    tales: tuple[ModelSpec, dict[str, Tensor], Judge],
) -> None:
    """At 4.5 bits: less KL than the uniform format of 4.5 bits, and than the straight line between
    the uniform formats of its own candidates."""
    spec, tensors, judge = tales
    text = windows("calibration.txt", 4)

    def kl(**fields: Any) -> float:
        _, out, run = run_step(Quantize.model_validate(fields), spec, tensors, text)
        print("; ".join(run.notes))
        return judge(out)[0]

    uniform = kl(format="int4", group_size=32)
    coarse, fine = (kl(format="int4", group_size=g, symmetric=False) for g in (64, 32))
    mixed = kl(target_bits=4.5)
    share = (4.5 - 4.3125) / (4.625 - 4.3125)
    line = coarse + share * (fine - coarse)
    print(f"4.5 bits: uniform {uniform:.4f}, line {line:.4f}, mixed {mixed:.4f} nats a token")
    print(f"int4-g64-asym {coarse:.4f}, int4-g32-asym {fine:.4f}")
    assert mixed < 0.9 * uniform and mixed < line
