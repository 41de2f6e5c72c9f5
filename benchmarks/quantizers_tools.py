"""The other tools' half of ``quantizers_compare.py``, run in an interpreter that has them.

    python quantizers_tools.py DIR

DIR has ``job.json`` and ``tokens.pt``; models go into DIR, and ``done.json`` names them.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def compressed(name: str, scratch: Path, job: dict, tokens: torch.Tensor) -> Path:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    def scheme(*, symmetric: bool, observer: str) -> dict:
        weights = QuantizationArgs(
            num_bits=4,
            type="int",
            strategy="group",
            group_size=job["group_size"],
            symmetric=symmetric,
            observer=observer,
        )
        return {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}

    head = ["lm_head"]
    if "GPTQ" in name:
        observer = "memoryless_mse" if "mse" in name else "memoryless_minmax"
        groups = scheme(symmetric=True, observer=observer)
        recipe: list = [GPTQModifier(config_groups=groups, ignore=head)]
    else:
        groups = scheme(symmetric="ASYM" not in name, observer="memoryless_minmax")
        recipe = [
            AWQModifier(duo_scaling="both"),
            QuantizationModifier(config_groups=groups, ignore=head),
        ]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
    )
    target = scratch / name.replace(" ", "-")
    model.save_pretrained(target, save_compressed=True)
    return target


def half_quadratic(name: str, scratch: Path, job: dict) -> Path:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    config = BaseQuantizeConfig(nbits=4, group_size=job["group_size"], axis=1)
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            layer = HQQLinear(
                module, config, compute_dtype=torch.float32, device="cpu", del_orig=False
            )
            module.weight.data = layer.dequantize().float().contiguous()
    target = scratch / name.replace(" ", "-")
    model.save_pretrained(target)
    return target


def probe(path: Path, tokens: torch.Tensor) -> str:
    """What transformers makes of a saved model: the logits of a text, in a file."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits = model(tokens[None]).logits[0].float()
    file = path.with_suffix(".probe.pt")
    torch.save(logits, file)
    return file.name


def main() -> None:
    scratch = Path(sys.argv[1])
    job = json.loads((scratch / "job.json").read_text())
    tokens = torch.load(scratch / "tokens.pt", weights_only=True)
    # Its AWQ pins tensors for a transfer that a machine without an accelerator does not make.
    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda self, *args: self  # type: ignore[method-assign]
    models: dict[str, dict] = {}
    for name in (
        "hqq 4-bit",
        "llmcompressor GPTQ W4A16",
        "llmcompressor GPTQ W4A16 mse",
        "llmcompressor AWQ W4A16",
        "llmcompressor AWQ W4A16_ASYM",
    ):
        if name.startswith("hqq"):
            path = half_quadratic(name, scratch, job)
        else:
            path = compressed(name, scratch, job, tokens)
        models[name] = {"path": path.name, "probe": probe(path, tokens[0])}
        if name.startswith("hqq"):  # a scale and a zero point of 16 bits, both real numbers
            models[name]["bits"] = 4 + 32 / job["group_size"]
    packages = ("llmcompressor", "compressed-tensors", "hqq", "transformers")
    done = {"models": models, "versions": {p: version(p) for p in packages}}
    (scratch / "done.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main()
