"""A step run over a decoder in memory, unit by unit, as the pipeline does it on disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skimp.decoding.params import SamplingParams
from skimp.engine import Engine, EngineOptions
from skimp.kernels.ops import StepInputs
from skimp.kernels.plain import PlainOps
from skimp.model.decoder import Decoder
from skimp.model.loading import assign, empty_decoder, load_decoder
from skimp.model.spec import ModelSpec
from skimp.shrink.step import Run, Step, Unit, unit_names


def named(decoder: Decoder) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in decoder.named_parameters()}


def unit_of(name: str) -> str:
    if name.startswith("layers."):
        return ".".join(name.split(".")[:2])
    return "embed" if name.startswith("embed_tokens") else "head"


def run_step(
    step: Step, spec: ModelSpec, tensors: dict[str, Tensor], tokens: Tensor | None = None
) -> tuple[ModelSpec, dict[str, Any], Run]:
    """The spec and tensors that come out, and the last pass's Run."""
    need = step.need(spec)
    state: dict[str, Any] = {}
    notes: list[str] = []
    out: dict[str, Any] = {}
    for pass_index in range(need.passes):
        hidden = None
        for index, name in enumerate(unit_names(spec)):
            own = {n: t for n, t in tensors.items() if unit_of(n) == name}
            tied = name == "head" and spec.tie_embeddings
            table = tensors["embed_tokens.weight"] if tied else None
            unit = Unit(name=name, index=index, spec=spec, tensors=own, table=table)
            run = Run(
                pass_index=pass_index,
                state=json.loads(json.dumps(state)),
                notes=notes,
                tokens=tokens if need.calibration else None,
                hidden=hidden,
            )
            result = step.visit(unit, run)
            hidden, state = result.hidden, run.state
            assert (result.tensors is None) == (pass_index < need.passes - 1)
            out |= result.tensors or {}
    return step.output_spec(spec, state), out, run


def decoder_of(spec: ModelSpec, tensors: dict[str, Any]) -> Decoder:
    decoder = empty_decoder(spec)
    assert set(dict(decoder.named_parameters())) == set(tensors)
    for name, tensor in tensors.items():
        assign(decoder, name, tensor if isinstance(tensor, Tensor) else tensor.dequantize())
    return decoder


def logits(decoder: Decoder, tokens: list[int]) -> Tensor:
    """[T, V], every position of one sequence."""
    count = len(tokens)
    ids = torch.tensor(tokens, dtype=torch.int32)
    positions = torch.arange(count, dtype=torch.int32)
    step = StepInputs(
        token_ids=ids,
        positions=positions,
        row_seq=torch.zeros(count, dtype=torch.int32),
        kv_end=positions + 1,
        seq_starts=torch.tensor([0, count], dtype=torch.int32),
        logit_rows=positions,
    )
    ops = PlainOps()
    with torch.no_grad():
        return decoder.bind(ops, max_positions=count)(step, ops)


def greedy_agrees(model: Any, directory: Path, prompt: list[int], count: int = 16) -> bool:
    """Whether our engine and a transformers model of the same checkpoint say the same."""
    options = EngineOptions(dtype="float32", max_context=len(prompt) + count, threads=1)
    engine = Engine(load_decoder(directory), None, options)
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    ours = engine.generate([prompt], params)[0].outputs[0].token_ids
    theirs = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            theirs.append(int(model(torch.tensor([theirs])).logits[0, -1].argmax()))
    return ours == theirs[len(prompt) :]


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference in units of the spread of a."""
    return float((a - b).abs().max() / a.std())


def varied(decoder: Decoder, seed: int = 0) -> Decoder:
    """Norm gains that are no ones and biases that are no zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in decoder.named_parameters():
        if "norm" in name:
            p.data.add_(torch.rand(p.shape, generator=generator) - 0.5)
        elif name.endswith("bias"):
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return decoder


def spec_like(spec: ModelSpec, *, tied: bool, **mixer: Any) -> ModelSpec:
    layers = tuple(
        dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, **mixer))
        for layer in spec.layers
    )
    return dataclasses.replace(spec, layers=layers, tie_embeddings=tied)
