"""Our quantizers against llm-compressor's and hqq's: one model, one calibration, one text.

    python benchmarks/quantizers_compare.py --model DIR --tools-python PYTHON -o RESULT

``--tools-python`` is an interpreter that has ``llmcompressor`` and ``hqq``. Every model is judged
by the same code: weights dequantized to float32, all windows of the evaluation text, KL to the base
and bits per byte, with 95 % intervals from a bootstrap over windows. Differences (of ours and
theirs, of each and the base) are paired: their interval is over the same windows. ``probe`` says
how far the logits of a tool's model, as read here, are from those that transformers computes from
the same directory. Writes RESULT.md and RESULT.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from skimp.formats.weight import QuantizedWeight, WeightFormat, quantize
from skimp.kernels.lowbit import round_rows
from skimp.kernels.plain import PlainOps, rms_norm
from skimp.meter.quality import split_documents
from skimp.model.decoder import Decoder
from skimp.model.loading import assign, empty_decoder, load_decoder, load_spec, parameter_shapes
from skimp.model.saving import module_tensors
from skimp.model.spec import ModelSpec
from skimp.shrink.capture import whole_text
from skimp.shrink.quantize import Quantize
from skimp.shrink.step import Run, Unit, unit_names
from skimp.text import Tokenizer

ASSETS = Path(__file__).parents[1] / "src/skimp/assets"
TOOLS = Path(__file__).with_name("quantizers_tools.py")
RESAMPLES = 4000
# Ours, and the tool's row each has to match. Formats are the tools' own defaults.
OURS: dict[str, tuple[dict[str, Any], str | None]] = {
    "skimp rtn int4": ({"format": "int4", "method": "rtn"}, None),
    "skimp rtn int4-asym": ({"format": "int4", "method": "rtn", "symmetric": False}, None),
    "skimp hqq int4-asym": ({"format": "int4", "method": "hqq"}, "hqq 4-bit"),
    "skimp hqq int4": ({"format": "int4", "method": "hqq", "symmetric": True}, None),
    "skimp gptq int4": ({"format": "int4", "method": "gptq"}, "llmcompressor GPTQ W4A16"),
    "skimp gptq int4-asym": ({"format": "int4", "method": "gptq", "symmetric": False}, None),
    "skimp awq int4": ({"format": "int4", "method": "awq"}, "llmcompressor AWQ W4A16"),
    "skimp awq int4-asym": (
        {"format": "int4", "method": "awq", "symmetric": False},
        "llmcompressor AWQ W4A16_ASYM",
    ),
    "skimp rtn int8": ({"format": "int8", "method": "rtn"}, None),
    "skimp rtn int8-a8": ({"format": "int8", "method": "rtn", "activations": "int8"}, None),
    "skimp rtn fp8": ({"format": "fp8", "method": "rtn"}, None),
    "skimp rtn fp8-afp8": ({"format": "fp8", "method": "rtn", "activations": "fp8"}, None),
}
NEAREST = {"nearest int4": True, "nearest int4-asym": False}  # scales that cover the range


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of each window: KL to the base and bits, in nats and bits, and bytes."""

    kl: Tensor
    bits: Tensor
    positions: int
    bytes: int


def windows(tokenizer: Tokenizer, text: str, length: int, prefix: int) -> Tensor:
    """Token windows [W, length] of a text, a document after the other, the rest dropped."""
    ids: list[int] = []
    for document in split_documents(text):
        ids += [prefix, *tokenizer.encode(document, add_special=False)]
    whole = len(ids) // length * length
    return torch.tensor(ids[:whole]).view(-1, length)


def shrunk(
    step: Quantize, spec: ModelSpec, tensors: dict[str, Tensor], tokens: Tensor
) -> tuple[ModelSpec, dict[str, Tensor | QuantizedWeight], list[str]]:
    """The step run over a model in memory, as the pipeline does it on disk."""
    calibrated, notes = step.need(spec).calibration, []
    hidden = None
    out: dict[str, Tensor | QuantizedWeight] = {}
    for index, name in enumerate(unit_names(spec)):
        own = {n: t for n, t in tensors.items() if _unit(n) == name}
        unit = Unit(name=name, index=index, spec=spec, tensors=own)
        run = Run(pass_index=0, state={}, notes=notes, tokens=tokens if calibrated else None)
        run.hidden = hidden
        result = step.visit(unit, run)
        assert result.tensors is not None
        out |= result.tensors
        hidden = result.hidden
    return step.output_spec(spec, {}), out, notes


def _unit(name: str) -> str:
    if name.startswith("layers."):
        return ".".join(name.split(".")[:2])
    return "embed" if name.startswith("embed_tokens") else "head"


def in_float32(spec: ModelSpec, tensors: dict[str, Tensor | QuantizedWeight]) -> Decoder:
    decoder = empty_decoder(dataclasses.replace(spec, formats={}))
    for name, tensor in tensors.items():
        dense = tensor.dequantize() if isinstance(tensor, QuantizedWeight) else tensor.float()
        assign(decoder, name, dense)
    return decoder


class RoundedInputs(PlainOps):
    """Products of whose inputs each row is rounded, but for the output matrix."""

    def __init__(self, vocab: int, activations: Literal["int8", "fp8"]) -> None:
        super().__init__()
        self.vocab, self.activations = vocab, activations

    def matmul(self, x: Tensor, matrix: Any, **more: Any) -> Tensor:
        norm = more.pop("norm", None)
        x = x if norm is None else rms_norm(x, norm)
        if matrix.linears[0].out_features != self.vocab:
            x = round_rows(x, self.activations)
        return super().matmul(x, matrix, **more)


@dataclasses.dataclass(frozen=True)
class Candidate:
    decoder: Decoder
    bits: float  # a weight of those that were to be rounded, scales and zero points counted
    ops: PlainOps = dataclasses.field(default_factory=PlainOps)
    notes: tuple[str, ...] = ()
    probe: float | None = None


def mean_bits(spec: ModelSpec, formats: dict[str, WeightFormat]) -> float:
    """Of the matrices in the layers."""
    bits = weights = 0.0
    for name, shape in parameter_shapes(spec).items():
        if name.startswith("layers.") and len(shape) == 2:
            form = formats.get(name.removesuffix(".weight"))
            bits += math.prod(shape) * (16 if form is None else form.bits_per_weight(shape[1]))
            weights += math.prod(shape)
    return bits / weights


def log_probabilities(candidate: Candidate, window: Tensor) -> Tensor:
    """float32 [T - 1, V] of a window [T]."""
    with torch.no_grad():
        logits = candidate.decoder(whole_text(window.int()), candidate.ops)
    return logits[:-1].log_softmax(-1)


def apart(decoder: Decoder, window: Tensor, logits: Tensor) -> float:
    """Largest difference of a model's logits from ``logits`` [T, V], in spreads of these."""
    ops = PlainOps()
    with torch.no_grad():
        mine = decoder.bind(ops, max_positions=len(window))(whole_text(window.int()), ops)
    return float((mine - logits).abs().max() / logits.std())


def score(candidates: dict[str, Candidate], tokens: Tensor, size: int) -> dict[str, Scores]:
    """All of them window by window, so that the base's distributions are made once."""
    kl: dict[str, list[float]] = {name: [] for name in candidates}
    bits: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        candidate.decoder.bind(candidate.ops, max_positions=tokens.shape[1])
    for window in tokens:
        p = log_probabilities(candidates["base"], window)
        probability = p.exp()
        for name, candidate in candidates.items():
            q = p if name == "base" else log_probabilities(candidate, window)
            kl[name].append(float((probability * (p - q)).sum()))
            bits[name].append(-float(q.gather(1, window[1:, None]).sum()) / math.log(2))
    positions = tokens.shape[0] * (tokens.shape[1] - 1)
    return {
        name: Scores(torch.tensor(kl[name]), torch.tensor(bits[name]), positions, size)
        for name in candidates
    }


def interval(values: Tensor, count: int) -> tuple[float, float, float]:
    """Sum of the windows' values over ``count``, and its 95 % bootstrap interval."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    sums = values.double()[draws].sum(1) / count
    low, high = torch.quantile(sums, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(values.double().sum()) / count, low, high


def row(scores: Scores, base: Scores) -> dict[str, Any]:
    kl, kl_low, kl_high = interval(scores.kl, scores.positions)
    bits, low, high = interval(scores.bits, scores.bytes)
    more = interval(scores.bits - base.bits, scores.bytes)
    return {
        "kl": kl,
        "kl_ci95": [kl_low, kl_high],
        "bits_per_byte": bits,
        "ci95": [low, high],
        "over_base": more[0],
        "over_base_ci95": more[1:],
        "inside_noise": more[1] <= 0 <= more[2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=ASSETS / "models/tales")
    parser.add_argument("--tools-python", help="an interpreter with llmcompressor and hqq")
    parser.add_argument("--tools-models", type=Path, help="keep or find the tools' models here")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, help="calibration windows (default: all)")
    parser.add_argument("--windows", type=int, help="evaluation windows (default: all)")
    parser.add_argument("--only", nargs="*", help="parts of the names of our rows")
    parser.add_argument("-o", "--output", type=Path, help="without a suffix")
    options = parser.parse_args()
    spec = load_spec(options.model)
    base = load_decoder(options.model)
    tensors = module_tensors(base)
    tokenizer = Tokenizer.load(options.model)
    prefix = spec.bos_token_id if spec.bos_token_id is not None else spec.eos_token_ids[0]
    texts = {n: (ASSETS / f"text/{n}.txt").read_text() for n in ("calibration", "evaluation")}
    calibration = windows(tokenizer, texts["calibration"], options.length, prefix)
    calibration = calibration[: options.samples]
    evaluation = windows(tokenizer, texts["evaluation"], options.length, prefix)
    evaluation = evaluation[: options.windows]
    # The first token of a window is given, so its bytes are not counted.
    size = sum(len(tokenizer.decode(w[1:].tolist()).encode()) for w in evaluation)
    candidates = {"base": Candidate(in_float32(spec, tensors), 16.0)}
    versions = {"torch": torch.__version__}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.tools_models or Path(scratch)
        if options.tools_python:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(calibration, folder / "tokens.pt")
            job = {"model": str(options.model.resolve()), "group_size": options.group_size}
            (folder / "job.json").write_text(json.dumps(job))
            subprocess.run([options.tools_python, TOOLS, folder], check=True)
        if (folder / "done.json").exists():
            said = json.loads((folder / "done.json").read_text())
            versions |= said["versions"]
            for name, entry in said["models"].items():
                decoder = load_decoder(folder / entry["path"])
                dense = in_float32(decoder.spec, module_tensors(decoder))
                bits = entry.get("bits") or mean_bits(spec, dict(decoder.spec.formats))
                probe = torch.load(folder / entry["probe"], weights_only=True)
                candidates[name] = Candidate(dense, bits, probe=apart(dense, calibration[0], probe))
    for name, symmetric in NEAREST.items():
        fields = {"format": "int4", "group_size": options.group_size, "symmetric": symmetric}
        formats = Quantize.model_validate(fields).formats(spec)
        plain = dict(tensors)
        for matrix, form in formats.items():
            plain[f"{matrix}.weight"] = quantize(tensors[f"{matrix}.weight"], form)
        candidates[name] = Candidate(in_float32(spec, plain), mean_bits(spec, formats))
    for name, (fields, _) in OURS.items():
        if options.only and not any(part in name for part in options.only):
            continue
        more = {"group_size": options.group_size} if fields["format"] == "int4" else {}
        step = Quantize.model_validate({**fields, **more})
        began = time.perf_counter()
        out_spec, out, notes = shrunk(step, spec, tensors, calibration)
        seconds = time.perf_counter() - began
        ops = PlainOps()
        if step.activations != "none":
            ops = RoundedInputs(spec.vocab_size, step.activations)
        bits = mean_bits(spec, dict(out_spec.formats))
        candidates[name] = Candidate(in_float32(out_spec, out), bits, ops, tuple(notes))
        print(f"{name}: {seconds:.1f} s", flush=True)
    found = score(candidates, evaluation, size)
    rows = {
        name: {
            **row(found[name], found["base"]),
            "bits_per_weight": c.bits,
            "notes": list(c.notes),
            "probe": c.probe,
        }
        for name, c in candidates.items()
    }
    duels = []
    for ours, (_, theirs) in OURS.items():
        if ours in found and theirs in found:
            kl = interval(found[ours].kl - found[theirs].kl, found[ours].positions)
            bits = interval(found[ours].bits - found[theirs].bits, size)
            duels.append({"ours": ours, "theirs": theirs, "kl": kl, "bits_per_byte": bits})
    result = {
        "model": options.model.name,
        "group_size": options.group_size,
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
        "calibration_windows": len(calibration),
        "evaluation_windows": len(evaluation),
        "window_tokens": options.length,
        "rows": rows,
        "duels": duels,
    }
    text = markdown(result)
    print(text)
    if options.output:
        options.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(text)


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"# Quantizers on {result['model']}, groups of {result['group_size']}",
        "",
        f"{result['calibration_windows']} calibration and {result['evaluation_windows']} "
        f"evaluation windows of {result['window_tokens']} tokens, the same for all; "
        "weights judged in float32; "
        "95 % intervals from a bootstrap over windows. "
        + ", ".join(f"{k} {v}" for k, v in result["versions"].items())
        + ".",
        "",
        "| quantizer | bits a weight | KL to base (nats/token) | bits per byte | over the base |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, r in sorted(result["rows"].items(), key=lambda item: item[1]["kl"]):
        lines.append(
            f"| {name} | {r['bits_per_weight']:.3f} | "
            f"{r['kl']:.6f} ({r['kl_ci95'][0]:.6f} to {r['kl_ci95'][1]:.6f}) | "
            f"{r['bits_per_byte']:.5f} ({r['ci95'][0]:.5f} to {r['ci95'][1]:.5f}) | "
            f"{r['over_base']:+.5f} ({r['over_base_ci95'][0]:+.5f} to "
            f"{r['over_base_ci95'][1]:+.5f}{', inside the noise' if r['inside_noise'] else ''}) |"
        )
    probes = [f"{n} {r['probe']:.1e}" for n, r in result["rows"].items() if r["probe"] is not None]
    if probes:
        lines += ["", "Logits of the tools' models as read here, against transformers reading the "]
        lines[-1] += "same directory (largest difference in spreads): " + ", ".join(probes) + "."
    lines += ["", "Ours minus theirs, paired window by window (below nought: ours loses less):", ""]
    lines += ["| ours | theirs | KL | bits per byte |", "| --- | --- | --- | --- |"]
    for duel in result["duels"]:
        kl, bits = duel["kl"], duel["bits_per_byte"]
        lines.append(
            f"| {duel['ours']} | {duel['theirs']} | {kl[0]:+.6f} ({kl[1]:+.6f} to {kl[2]:+.6f}) | "
            f"{bits[0]:+.5f} ({bits[1]:+.5f} to {bits[2]:+.5f}) |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
