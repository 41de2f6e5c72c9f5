"""Model files for the comparison: one set of random weights, in every engine's own format.

The weights are drawn once (matrices and biases from N(0, 0.02), norms 1) and written as bfloat16
safetensors in Hugging Face layout; every other file is converted from those, so that all engines
compute the same function and their first greedy tokens can be compared.

Run as ``python -m rivals.artifacts CONFIG.json WORK_DIR FORMAT...`` from ``benchmarks/``.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

SEED = 20_26
STANDARD_DEVIATION = 0.02
DUMMY_WORDS = 1000
FAMILIES = ("llama", "qwen2")
QUANTIZED_GGUF = {"gguf-q8_0": 7, "gguf-q4_0": 2}  # values of llama.cpp's enum llama_ftype
OPENVINO_WEIGHTS = {"openvino-bf16": None, "openvino-int8": "int8", "openvino-int4": "int4"}
# The layers and the output matrix in low bits, rounded to nearest: the method does not change the
# speed. Groups of 32 are what llama.cpp's Q4_0 and onnxruntime's int4 have; they divide every size.
# Both of them, and Q8_0, multiply by inputs rounded to int8, which is what "a8" does too.
INT8 = "- quantize: {{format: int8, method: rtn, include: [embed_tokens]{0}}}\n"
INT4 = (
    "- quantize: {{format: int4, group_size: 32, method: rtn{0}}}\n"
    "- quantize: {{format: int8, method: rtn, include: [embed_tokens], exclude: ['layers.*']{0}}}\n"
)
INT4_WHOLE = (
    "- quantize: {{format: int4, group_size: 32, method: rtn, include: [embed_tokens]{0}}}\n"
)
SKIMP_RECIPES = {
    f"skimp-{name}{suffix}": recipe.format(inputs)
    for name, recipe in {"int8": INT8, "int4": INT4, "int4-whole": INT4_WHOLE}.items()
    for suffix, inputs in {"": "", "-a8": ", activations: int8"}.items()
}
FORMATS = ("hf", "gguf-bf16", *QUANTIZED_GGUF, *OPENVINO_WEIGHTS, "onnx-int4", *SKIMP_RECIPES)


def model_folder(config: Path, work: Path) -> Path:
    """The folder of one shape inside the work folder; it changes when the shape changes."""
    digest = hashlib.sha256(config.read_bytes()).hexdigest()[:8]
    return work / f"{config.stem}-{digest}"


def artifact(config: Path, work: Path, form: str) -> Path:
    """Where the file (GGUF) or folder (others) of format ``form`` lies or will lie."""
    name = f"{form}.gguf" if form.startswith("gguf-") else form
    return model_folder(config, work) / name


def read_config(path: Path) -> dict[str, Any]:
    """Read a shape and refuse what this harness cannot convert.

    Raises:
        ValueError: the family is unknown or the config asks for scaled or windowed attention.
    """
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{path.name}: model_type {family!r} is not one of {FAMILIES}")
    if config.get("rope_scaling"):
        raise ValueError(f"{path.name}: rope_scaling is not supported here")
    if config.get("use_sliding_window"):
        raise ValueError(f"{path.name}: use_sliding_window is not supported here")
    if family == "llama" and (config.get("attention_bias") or config.get("mlp_bias")):
        raise ValueError(f"{path.name}: attention_bias and mlp_bias are not supported here")
    return config


def head_dim(config: dict[str, Any]) -> int:
    """Numbers in one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in Hugging Face layout (weights are [out, in])."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    rows_q = config["num_attention_heads"] * head_dim(config)
    rows_kv = config["num_key_value_heads"] * head_dim(config)
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for name, rows in (("q", rows_q), ("k", rows_kv), ("v", rows_kv)):
            yield f"{layer}.self_attn.{name}_proj.weight", (rows, hidden)
            if config["model_type"] == "qwen2":
                yield f"{layer}.self_attn.{name}_proj.bias", (rows,)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, rows_q)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def make_hf(config_path: Path, out: Path) -> None:
    """Draw the weights and write them as bfloat16 safetensors beside ``config.json``."""
    import torch
    from safetensors.torch import save_file

    config = read_config(config_path)
    generator = torch.Generator().manual_seed(SEED)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in tensor_shapes(config):
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            drawn = torch.randn(shape, generator=generator) * STANDARD_DEVIATION
            tensors[name] = drawn.to(torch.bfloat16)
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out / "tokenizer.json").write_text(json.dumps(dummy_tokenizer()) + "\n", encoding="utf-8")


def dummy_tokenizer() -> dict[str, Any]:
    """A word-level tokenizer for engines that take only text: ``w123`` is id 123."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {f"w{index}": index for index in range(DUMMY_WORDS)},
            "unk_token": "w0",
        },
    }


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face tensor name."""
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    part = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    _, _, index, rest = name.split(".", 3)
    stem, kind = rest.rsplit(".", 1)
    return f"blk.{index}.{part[stem]}.{kind}"


def interleave_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key matrix [heads * d, in] for llama.cpp's `llama` rotation.

    Hugging Face rotates the pairs (i, i + d/2) of a head, llama.cpp the pairs (2i, 2i + 1).
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def make_gguf(config_path: Path, hf: Path, out: Path) -> None:
    """Convert to GGUF: matrices in bfloat16, norms and biases in float32, no tokenizer."""
    import gguf
    import torch
    from safetensors.torch import load_file

    config = read_config(config_path)
    family = config["model_type"]
    writer = gguf.GGUFWriter(out, family)
    writer.add_name(config_path.stem)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in load_file(hf / "model.safetensors").items():
        projection = name.split(".")[-2]
        if family == "llama" and projection in heads:
            tensor = interleave_halves(tensor, heads[projection])
        if tensor.dim() == 1:
            writer.add_tensor(gguf_name(name), tensor.float().numpy())
            continue
        words: np.ndarray[Any, Any] = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(gguf_name(name), words, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize_gguf(source: Path, out: Path, file_type: int) -> None:
    """Quantize a bfloat16 GGUF with llama.cpp's own recipe for ``file_type``.

    Raises:
        RuntimeError: llama.cpp refused.
    """
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    params.nthread = os.cpu_count() or 1
    status = llama_cpp.llama_model_quantize(
        os.fsencode(source), os.fsencode(out), ctypes.byref(params)
    )
    if status != 0:
        raise RuntimeError(f"llama.cpp could not quantize {source.name} (status {status})")


def make_openvino(hf: Path, out: Path, weight_format: str | None, python: str) -> None:
    """Export to OpenVINO IR with optimum-intel, which may live in another environment.

    Without ``weight_format`` the bfloat16 weights are kept as they are.

    Raises:
        RuntimeError: the exporter failed; its last lines are in the message.
    """
    program = "from optimum.commands.optimum_cli import main; main()"
    command = [python, "-c", program, "export", "openvino", "--model", str(hf)]
    command += ["--task", "text-generation-with-past", "--disable-convert-tokenizer"]
    if weight_format:
        command += ["--weight-format", weight_format]
    if weight_format == "int4":  # groups of 128 where the sizes allow, else the next that fits
        command += ["--group-size-fallback", "adjust"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    _convert([*command, str(out)], out / "openvino_model.xml", environment)


def make_onnx(hf: Path, out: Path) -> None:
    """Build int4 weights in blocks of 32 with onnxruntime-genai's own builder, its CPU defaults.

    Raises:
        RuntimeError: the builder failed; its last lines are in the message.
    """
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(hf)]
    command += ["-o", str(out), "-p", "int4", "-e", "cpu", "-c", str(out / "cache")]
    command += ["--extra_options", "int4_block_size=32"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    _convert(command, out / "model.onnx", environment)
    shutil.rmtree(out / "cache", ignore_errors=True)


def make_skimp(hf: Path, out: Path, recipe: str, skimp: str) -> None:
    """Shrink with skimp's own command.

    Raises:
        RuntimeError: it failed; its last lines are in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_text(recipe, encoding="utf-8")
        command = [*shlex.split(skimp), "shrink", str(hf), str(path), "-o", str(out), "--quiet"]
        _convert(command, out / "config.json", dict(os.environ))


def _convert(command: list[str], result: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0 or not result.exists():
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise RuntimeError(f"making {result.parent.name} failed:\n{tail}")


def ensure(
    config: Path,
    work: Path,
    form: str,
    convert_python: str = sys.executable,
    skimp: str = "skimp",
) -> Path:
    """Return the artifact of format ``form``, making it (whole, then renamed) when missing.

    Raises:
        ValueError: the format or the shape is unknown.
        RuntimeError: a converter failed.
    """
    if form not in FORMATS:
        raise ValueError(f"format {form!r} is not one of {', '.join(FORMATS)}")
    out = artifact(config, work, form)
    if out.exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"partial-{out.name}")
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    if form == "hf":
        make_hf(config, partial)
    else:
        hf = ensure(config, work, "hf", convert_python)
        if form == "gguf-bf16":
            make_gguf(config, hf, partial)
        elif form in QUANTIZED_GGUF:
            source = ensure(config, work, "gguf-bf16", convert_python)
            quantize_gguf(source, partial, QUANTIZED_GGUF[form])
        elif form == "onnx-int4":
            make_onnx(hf, partial)
        elif form in SKIMP_RECIPES:
            make_skimp(hf, partial, SKIMP_RECIPES[form], skimp)
        else:
            make_openvino(hf, partial, OPENVINO_WEIGHTS[form], convert_python)
    partial.rename(out)
    return out


def main() -> int:
    """Make the named formats; exit status 1 with a message when one cannot be made."""
    parser = argparse.ArgumentParser(description="make the model files of one shape")
    parser.add_argument("config", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("formats", nargs="+", choices=FORMATS)
    parser.add_argument("--convert-python", default=sys.executable)
    parser.add_argument("--skimp", default="skimp")
    options = parser.parse_args()
    try:
        for form in options.formats:
            ensure(options.config, options.work, form, options.convert_python, options.skimp)
    except (ImportError, RuntimeError, ValueError) as error:
        print(f"{form}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
