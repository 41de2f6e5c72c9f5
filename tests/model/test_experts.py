"""Mixtures of experts on the plain backend: against transformers' own modules, in every mode of
the backend, in the engine, and in checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_requests, tiny_spec
from torch import Tensor

from skimp.engine import Engine, EngineOptions
from skimp.errors import OptionError, ShrinkError
from skimp.formats import WeightFormat, quantize
from skimp.kernels.experts import route
from skimp.kernels.plain import PlainOps
from skimp.model import families
from skimp.model.ffn import Experts
from skimp.model.layers import RMSNorm
from skimp.model.loading import load_decoder, random_decoder
from skimp.model.saving import save_checkpoint
from skimp.model.spec import ClampedSwiGLU, ExpertsSpec, GatedFFNSpec, ModelSpec, RouterSpec
from skimp.shrink.cache import Cache
from skimp.shrink.capture import whole_text
from skimp.shrink.quantize import Quantize
from skimp.shrink.rotate import Rotate
from skimp.shrink.smooth import Smooth

HIDDEN = 32
SEPARATE = ExpertsSpec(
    num_experts=6,
    experts_per_token=2,
    intermediate_size=24,
    router=RouterSpec(normalize=True),
    shared=GatedFFNSpec(intermediate_size=40),
)
FUSED = ExpertsSpec(
    num_experts=5,
    experts_per_token=3,
    intermediate_size=20,
    activation=ClampedSwiGLU(limit=1.0),
    bias=True,
    router=RouterSpec(bias=True, normalize=True),
    fused=True,
)
BOTH = pytest.mark.parametrize("spec", [SEPARATE, FUSED], ids=["separate", "fused"])


def make(spec: ExpertsSpec, dtype: torch.dtype = torch.float32) -> tuple[Experts, RMSNorm]:
    """The same weights, up to rounding, at every call."""
    torch.manual_seed(3)
    layer, norm = Experts(spec, HIDDEN), RMSNorm(HIDDEN, eps=1e-5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.3)
        norm.weight.normal_(1.0, 0.2)
    return layer.to(dtype), norm.to(dtype)


def rows(count: int) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(count))


# ---- against transformers ---------------------------------------------------------------------

DEEPSEEK = {
    "hidden_size": HIDDEN,
    "moe_intermediate_size": 12,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
V2 = ExpertsSpec(
    num_experts=16,
    experts_per_token=4,
    intermediate_size=12,
    router=RouterSpec(groups=4, groups_chosen=2, scale=2.5),
    shared=GatedFFNSpec(intermediate_size=24),
)
V3 = dataclasses.replace(
    V2,
    router=RouterSpec(
        scoring="sigmoid",
        correction=True,
        groups=4,
        groups_chosen=2,
        group_score="top2",
        normalize=True,
        normalize_eps=1e-20,
        scale=2.5,
    ),
)
GREEDY = dataclasses.replace(V2, router=RouterSpec(scale=2.5))
CASES: dict[str, tuple[str, dict[str, Any], ExpertsSpec]] = {
    "v2-greedy": ("deepseek_v2", {"topk_method": "greedy"}, GREEDY),
    "v2-groups": ("deepseek_v2", {"topk_method": "group_limited_greedy"}, V2),
    "v3": ("deepseek_v3", {"norm_topk_prob": True}, V3),
    "v3-as-scored": (
        "deepseek_v3",
        {"norm_topk_prob": False},
        dataclasses.replace(V3, router=dataclasses.replace(V3.router, normalize=False)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_deepseek(case: str) -> None:
    """Routing in groups, corrections and shared experts, which only those have."""
    transformers = pytest.importorskip("transformers")
    kind, fields, spec = CASES[case]
    config = transformers.AutoConfig.for_model(kind, **DEEPSEEK, **fields)
    config._experts_implementation = "eager"
    module = {
        "deepseek_v2": "DeepseekV2Moe",
        "deepseek_v3": "DeepseekV3MoE",
    }[kind]
    source = __import__(f"transformers.models.{kind}.modeling_{kind}", fromlist=[module])
    oracle = getattr(source, module)(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in (*oracle.parameters(), *oracle.buffers()):
            tensor.normal_(0.0, 0.4)
    layer, norm = Experts(spec, HIDDEN), RMSNorm(HIDDEN, eps=1e-5)
    inner = spec.intermediate_size
    state = {"router.weight": oracle.gate.weight}
    if spec.router.correction:
        state["correction"] = oracle.gate.e_score_correction_bias
    for i in range(spec.num_experts):
        gate_up = oracle.experts.gate_up_proj[i]
        state[f"experts.{i}.gate_proj.weight"] = gate_up[:inner]
        state[f"experts.{i}.up_proj.weight"] = gate_up[inner:]
        state[f"experts.{i}.down_proj.weight"] = oracle.experts.down_proj[i]
    state |= {f"shared.{n}": p for n, p in oracle.shared_experts.named_parameters()}
    layer.load_state_dict(state)
    norm.weight.data.fill_(1.0)
    ops, x = PlainOps(), rows(50)
    with torch.no_grad():
        layer.bind(ops)
        found = layer.hidden(x, norm, ops)
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        wanted = oracle(normed[None])[0]
    assert float((found - wanted).abs().max() / wanted.std()) < 1e-4


# ---- the modes of the backend -----------------------------------------------------------------


def test_of_equals_the_first_are_chosen() -> None:
    chosen, weights = route(torch.zeros(1, 6), SEPARATE)
    assert chosen.tolist() == [[0, 1]] and weights.tolist() == [[0.5, 0.5]]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_serving_computes_what_training_computes(spec: ExpertsSpec, dtype: torch.dtype) -> None:
    x = rows(9)
    results = []
    for serving in (False, True):
        layer, norm = make(spec, dtype)
        ops = PlainOps(serving=serving)
        with torch.no_grad():
            layer.bind(ops)
            results.append(layer.hidden(x, norm, ops))
        matrices = [n for n, _ in layer.named_parameters() if n.endswith(("_proj", "weight"))]
        assert bool(matrices) != serving, "a serving backend takes the weights away"
    assert results[0].dtype == torch.float32
    error = (results[0] - results[1]).norm() / results[0].norm()
    assert float(error) < (1e-6 if dtype == torch.float32 else 2e-2)


@BOTH
def test_gradients_reach_every_parameter(spec: ExpertsSpec) -> None:
    layer, norm = make(spec)
    ops, x = PlainOps(), rows(40)
    x.requires_grad_(True)
    layer.bind(ops)
    layer.hidden(x, norm, ops).square().sum().backward()
    for name, parameter in [*layer.named_parameters(), ("norm", norm.weight), ("x", x)]:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_rows_do_not_depend_on_others(spec: ExpertsSpec, dtype: torch.dtype) -> None:
    layer, norm = make(spec, dtype)
    ops, x = PlainOps(serving=True, deterministic=True), rows(30)
    with torch.no_grad():
        layer.bind(ops)
        whole = layer.hidden(x, norm, ops)
        parts = [layer.hidden(part, norm, ops) for part in x.split((1, 12, 17))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("form", ["int8", "int8-a8", "int4-g16-asym", "fp8-afp8"])
def test_low_bit_experts_are_the_weights_they_stand_for(form: str) -> None:
    """Router and experts alike, on rows that the format rounds or does not."""
    x, form_ = rows(12), WeightFormat.named(form)
    spec = dataclasses.replace(SEPARATE, shared=None)
    results = []
    for dense in (True, False):
        layer, norm = make(spec)
        for name, module in list(layer.named_modules()):
            if name.endswith("_proj"):
                matrix = quantize(module.weight.detach(), form_)
                if dense:
                    module.weight.data = matrix.dequantize()
                else:
                    module.weight, module.quantized = None, matrix
        ops = PlainOps(serving=True)
        with torch.no_grad():
            layer.bind(ops)
            results.append(layer.hidden(x, norm, ops))
    error = float((results[0] - results[1]).norm() / results[0].norm())
    assert error < (1e-6 if form_.activations is None else 5e-2)
    assert form_.activations is None or error > 1e-4, "rows were not rounded"


# ---- models -----------------------------------------------------------------------------------


def model_spec(ffn: ExpertsSpec, family: str = "qwen3_moe", **changes: Any) -> ModelSpec:
    spec = tiny_spec((None, None) if family == "qwen3_moe" else (24, None))
    layers = tuple(dataclasses.replace(layer, ffn=ffn) for layer in spec.layers)
    return dataclasses.replace(spec, family=family, layers=layers, **changes)


QWEN = dataclasses.replace(SEPARATE, shared=None)


@pytest.mark.parametrize("backend", ["plain", "native"])
@pytest.mark.parametrize("ffn", [SEPARATE, FUSED], ids=["separate", "fused"])
def test_the_engine_batches_and_chunks_without_a_trace(ffn: ExpertsSpec, backend: Any) -> None:
    requests = random_requests(5, seed=4, max_prompt=40, max_output=8)

    def tokens(budget: int, together: bool, threads: int = 1) -> list[list[int]]:
        decoder = random_decoder(model_spec(ffn), seed=1)
        for parameter in decoder.parameters():
            parameter.data.mul_(4.0 if parameter.dim() > 1 else 1.0)
        options = EngineOptions(
            deterministic=True, token_budget=budget, threads=threads, backend=backend
        )
        engine = Engine(decoder, None, options)
        if together:
            outs = engine.generate([p for p, _ in requests], [s for _, s in requests])
        else:
            outs = [engine.generate([p], s)[0] for p, s in requests]
        return [out.outputs[0].token_ids for out in outs]

    alone = tokens(512, together=False)
    assert tokens(512, together=True) == alone
    assert tokens(7, together=True) == alone
    if backend == "native":
        assert tokens(512, together=True, threads=2) == alone


def test_low_bit_routers_run_on_the_plain_backend() -> None:
    """The native kernels multiply them in the model's dtype."""
    spec = model_spec(QWEN)
    formats = {"layers.1.ffn.router": WeightFormat(kind="int", bits=8)}
    spec = dataclasses.replace(spec, formats=formats)
    with pytest.raises(OptionError, match="native kernels have no routers in low-bit formats"):
        Engine(random_decoder(spec), None, EngineOptions(backend="native"))
    assert Engine(random_decoder(spec), None, EngineOptions()).backend_name == "plain"


@pytest.mark.parametrize("form", ["int8-a8", "int4-g32", "fp8-afp8"])
def test_quantized_checkpoints(form: str, tmp_path: Path) -> None:
    """In compressed-tensors, as other tools write experts: each matrix by itself, routers dense."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    spec = model_spec(dataclasses.replace(QWEN, intermediate_size=32))
    names = [n.removesuffix(".weight") for n in families.tensor_names(spec) if "_proj" in n]
    formats = dict.fromkeys(names, WeightFormat.named(form))
    assert sum("ffn.experts.5.down_proj" in name for name in formats) == 2
    decoder = random_decoder(dataclasses.replace(spec, formats=formats), seed=2)
    for parameter in decoder.parameters():
        parameter.data.mul_(4.0 if parameter.dim() > 1 else 1.0)
    saved = save_checkpoint(tmp_path / "model", decoder.spec, decoder)
    config = families.to_config(decoder.spec)["quantization_config"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert [n for n in config["ignore"] if "mlp.gate" in n] == [
        f"model.layers.{i}.mlp.gate" for i in range(2)
    ]
    again = load_decoder(saved)
    assert again.spec.formats == formats
    ids = torch.arange(3, 43, dtype=torch.int32)
    ops = PlainOps(serving=True)
    with torch.no_grad():
        found, before = (d.bind(ops)(whole_text(ids), ops) for d in (again, decoder))
    assert torch.equal(found, before)
    if form == "int8-a8":
        return  # transformers 5.24 fails to make one tensor of experts in this layout
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
        wanted = model(ids[None].long()).logits[0]
    rounds = formats[names[0]].activations is not None
    assert (found - wanted).norm() / wanted.norm() < (1e-2 if rounds else 1e-5)


def test_corrections_stay_float32() -> None:
    """They are added to scores of which small differences choose."""
    decoder = random_decoder(model_spec(V3), dtype="bfloat16")
    kinds = {n: p.dtype for n, p in decoder.named_parameters()}
    assert kinds.pop("layers.0.ffn.correction") == torch.float32
    assert kinds.pop("layers.1.ffn.correction") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}


@pytest.mark.parametrize(
    "step",
    [Quantize(format="int8"), Quantize(format="bf16"), Rotate(), Smooth()],
    ids=lambda step: step.kind,
)
def test_steps_that_cannot_take_experts_say_so(step: Any) -> None:
    with pytest.raises(ShrinkError, match=rf"{step.kind}: layer 0 is a mixture of experts"):
        step.need(model_spec(QWEN))


def test_a_cache_step_can() -> None:
    assert Cache(format="int8").need(model_spec(QWEN)).passes == 1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"experts_per_token": 7}, "experts_per_token"),
        ({"router": RouterSpec(groups=4)}, "groups"),
        ({"router": RouterSpec(groups=3, groups_chosen=4)}, "groups_chosen"),
        ({"router": RouterSpec(groups=6), "experts_per_token": 2}, "groups_chosen"),
        (
            {"router": RouterSpec(groups=6, groups_chosen=6, group_score="top2")},
            "groups",
        ),
    ],
)
def test_specs_that_contradict_themselves(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}:"):
        dataclasses.replace(SEPARATE, **changes)
