"""Reading config.json: old and new spellings, defaults, and refusals that name the field."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from typing import Any

import pytest
import torch
from model.config_fields import (
    CONFIGS,
    CWM,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GEMMA3,
    GPT_OSS,
    LLAMA,
    MINICPM3,
    MISTRAL,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    F,
    S,
)

from skimp.errors import ConfigError, SkimpError, SkimpWarning
from skimp.model import families
from skimp.model.rope import rope_tables
from skimp.model.spec import ClampedSwiGLU, ExpertsSpec, GatedFFNSpec, RopeSpec


@pytest.mark.parametrize("name", CONFIGS)
def test_real_field_sets_come_back_unchanged(name: str) -> None:
    config = CONFIGS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = families.to_spec(config)
    written = families.to_config(spec)
    assert families.to_spec(written) == spec
    # Values that the class does not use while windows are off, or that are written otherwise.
    loose = {"sliding_window_pattern"}
    if name == "gemma2":
        loose.add("hidden_act")
    if not config.get("use_sliding_window", True):
        loose.add("sliding_window")
    assert {k: written.get(k) for k in config if k not in loose} == {
        k: v for k, v in config.items() if k not in loose
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_same_spec_as_after_transformers(name: str) -> None:
    """What transformers makes of the old spelling and saves, we read as the same model."""
    transformers = pytest.importorskip("transformers")
    config = dict(CONFIGS[name])
    saved = transformers.AutoConfig.for_model(config.pop("model_type"), **config).to_dict()
    saved = json.loads(json.dumps(saved))
    assert families.to_spec(saved) == families.to_spec(CONFIGS[name])


def test_shared_configs(shared: Any) -> None:
    read = 0
    for file in sorted((shared / "configs").glob("*.json")):
        config = json.loads(file.read_text())
        if config["model_type"] in families.MODEL_TYPES:
            spec = families.to_spec(config)
            written = families.to_config(spec)
            assert families.to_spec(written) == spec
            assert all(written.get(k) == v for k, v in config.items()), file.name
            read += 1
        else:
            with pytest.raises(ConfigError, match=f"model_type='{config['model_type']}'"):
                families.to_spec(config)
    assert read >= 8


def test_defaults_are_those_of_the_class() -> None:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    transformers = pytest.importorskip("transformers")
    for name, full in CONFIGS.items():
        bare = {k: full[k] for k in (*sizes, "num_attention_heads")} | {"model_type": name}
        if name.startswith("qwen"):
            bare["num_key_value_heads"] = full["num_key_value_heads"]
        if name == "deepseek_v2":
            bare["num_experts_per_tok"] = full["num_experts_per_tok"]
        ours = families.to_spec(bare)
        fields = dict(bare)
        theirs = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields).to_dict()
        assert families.to_spec(json.loads(json.dumps(theirs))) == ours, name


def test_meanings() -> None:
    llama = families.to_spec(LLAMA)
    assert llama.eos_token_ids == (128001, 128008, 128009)
    assert llama.layers[0].mixer.scale == 64**-0.5
    assert llama.config["initializer_range"] == 0.02
    gemma = families.to_spec(GEMMA3)
    assert [x.mixer.window for x in gemma.layers[:7]] == [512] * 5 + [None, 512]
    local, everywhere = gemma.layers[0].mixer.rope, gemma.layers[5].mixer.rope
    assert local and everywhere and (local.theta, everywhere.theta) == (10000.0, 1000000.0)
    assert gemma.norm_plus_one and gemma.embed_scale == math.sqrt(1152)
    upper = families.to_spec(QWEN2 | {"use_sliding_window": True, "sliding_window": 64})
    assert [x.mixer.window for x in upper.layers] == [None] * 21 + [64] * 3
    assert [x.mixer.window for x in families.to_spec(CWM).layers[:5]] == [None, *[8192] * 3, None]
    moe = families.to_spec(QWEN3_MOE | {"decoder_sparse_step": 3, "mlp_only_layers": [5]})
    sparse = [isinstance(x.ffn, ExpertsSpec) for x in moe.layers]
    assert sparse == [False, False, True, False, False, False, False, False]
    assert moe.layers[0].ffn == GatedFFNSpec(intermediate_size=6144)
    oss = families.to_spec(GPT_OSS)
    assert [x.mixer.window for x in oss.layers] == [128, None] * 2
    assert oss.layers[0].ffn.activation == ClampedSwiGLU(alpha=1.702, limit=7.0)


def test_layers_with_experts_that_the_fields_do_not_say_are_written_out() -> None:
    """A converter may have moved them."""
    spec = families.to_spec(QWEN3_MOE | {"decoder_sparse_step": 2})
    dense, sparse = spec.layers[0], spec.layers[1]
    moved = dataclasses.replace(spec, layers=(sparse, dense, dense, *spec.layers[3:]))
    written = families.to_config(moved)
    assert (written["decoder_sparse_step"], written["mlp_only_layers"]) == (1, [1, 2, 4, 6])
    assert families.to_spec(written) == moved
    other = dataclasses.replace(sparse.ffn, intermediate_size=64)
    two_kinds = (dataclasses.replace(sparse, ffn=other), *spec.layers[1:])
    with pytest.raises(ConfigError, match=r"layers\[0\]|layers\[1\]"):
        families.to_config(dataclasses.replace(spec, layers=two_kinds))


def test_spec_the_class_cannot_express() -> None:
    spec = families.to_spec(LLAMA)
    first, *others = spec.layers

    def with_first(**changes: Any) -> Any:
        return dataclasses.replace(spec, layers=(dataclasses.replace(first, **changes), *others))

    mixer = dataclasses.replace(others[0].mixer, window=128)
    for changed, field in (
        (with_first(ffn=GatedFFNSpec(intermediate_size=64)), "intermediate_size"),
        (dataclasses.replace(spec, logit_softcap=30.0), "logit_softcap"),
        (with_first(mixer=mixer), "layers[0].mixer.window"),
        (dataclasses.replace(spec, embed_scale=2.0), "embed_scale"),
    ):
        with pytest.raises(ConfigError, match="cannot express") as caught:
            families.to_config(changed)
        assert field in str(caught.value)
    # The same layers with windows are a cwm, and are written as one.
    windowed = tuple(dataclasses.replace(x, mixer=mixer) for x in spec.layers[1:])
    cwm = dataclasses.replace(spec, family="cwm", layers=(first, *windowed))
    written = families.to_config(cwm)
    assert written["architectures"] == ["CwmForCausalLM"]
    assert families.to_spec(written) == cwm


def test_unknown_fields() -> None:
    with pytest.warns(SkimpWarning, match="favourite_colour='red' is unknown"):
        spec = families.to_spec(LLAMA | {"favourite_colour": "red"})
    assert families.to_config(spec)["favourite_colour"] == "red"
    with pytest.warns(SkimpWarning, match="auto_map is skipped"):
        families.to_spec(LLAMA | {"auto_map": {"AutoModel": "modeling.Evil"}})


def llama3(**changes: Any) -> dict[str, Any]:
    return {"rope_scaling": {**LLAMA["rope_scaling"], **changes}}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    # name: (config, changes, words of the message); a change to ... removes the field
    "no type": (LLAMA, {"model_type": ...}, ("model_type",)),
    "unknown type": (LLAMA, {"model_type": "mamba2"}, ("model_type='mamba2'",)),
    "path type": (LLAMA, {"model_type": "../reader"}, ("model_type",)),
    "missing size": (LLAMA, {"hidden_size": ...}, ("hidden_size is missing",)),
    "null size": (LLAMA, {"vocab_size": None}, ("vocab_size", "None")),
    "zero size": (LLAMA, {"vocab_size": 0}, ("vocab_size", "0")),
    "negative size": (LLAMA, {"num_hidden_layers": -1}, ("num_hidden_layers", "-1")),
    "huge layers": (LLAMA, {"num_hidden_layers": 10**9}, ("num_hidden_layers", "1000000000")),
    "huge integer": (LLAMA, {"hidden_size": 10**5000}, ("hidden_size", "a huge integer")),
    "float size": (LLAMA, {"hidden_size": 2048.0}, ("hidden_size", "2048.0")),
    "NaN size": (LLAMA, {"intermediate_size": math.nan}, ("intermediate_size", "nan")),
    "string size": (LLAMA, {"hidden_size": "2048"}, ("hidden_size", "'2048'")),
    "bool size": (LLAMA, {"num_attention_heads": True}, ("num_attention_heads", "True")),
    "list size": (LLAMA, {"num_attention_heads": [32]}, ("num_attention_heads", "[32]")),
    "heads": (LLAMA, {"num_key_value_heads": 5}, ("heads=32", "num_key_value_heads=5")),
    "derived head": (
        LLAMA,
        {"head_dim": None, "hidden_size": 2050},
        ("hidden_size=2050", "num_attention_heads=32"),
    ),
    "odd head": (LLAMA, {"head_dim": 65}, ("head_dim=65",)),
    "NaN eps": (LLAMA, {"rms_norm_eps": math.nan}, ("rms_norm_eps", "nan")),
    "negative eps": (LLAMA, {"rms_norm_eps": -1e-5}, ("rms_norm_eps", "-1e-05")),
    "string bool": (LLAMA, {"tie_word_embeddings": "no"}, ("tie_word_embeddings", "'no'")),
    "integer bool": (LLAMA, {"attention_bias": 1}, ("attention_bias", "1")),
    "activation": (LLAMA, {"hidden_act": "relu2"}, ("hidden_act='relu2'",)),
    "dtype": (LLAMA, {"torch_dtype": "float8_e4m3fn"}, ("torch_dtype", "float8_e4m3fn")),
    "two dtypes": (LLAMA, {"dtype": "float32"}, ("dtype", "bfloat16", "float32")),
    "eos range": (LLAMA, {"eos_token_id": 128256}, ("eos_token_id", "128256")),
    "eos list": (LLAMA, {"eos_token_id": [1, "2"]}, ("eos_token_id", "'2'")),
    "quantized": (
        LLAMA,
        {"quantization_config": {"quant_method": "gptq"}},
        ("quantization_config", "gptq"),
    ),
    "window in llama": (LLAMA, {"sliding_window": 4096}, ("sliding_window=4096",)),
    "experts": (LLAMA, {"num_local_experts": 8}, ("num_local_experts=8",)),
    "multiplier": (LLAMA, {"embedding_multiplier": 12}, ("embedding_multiplier=12",)),
    "theta": (LLAMA, {"rope_theta": -1.0}, ("rope_theta", "-1.0")),
    "theta inf": (LLAMA, {"rope_theta": math.inf}, ("rope_theta", "inf")),
    "theta twice": (LLAMA, llama3(rope_theta=1e4), ("rope_theta=500000", "10000")),
    "scaling list": (LLAMA, {"rope_scaling": [1]}, ("rope_scaling", "[1]")),
    "rope type": (LLAMA, llama3(rope_type="spiral"), ("rope_type='spiral'",)),
    "rope types": (LLAMA, llama3(type="yarn"), ("type='yarn'", "rope_type='llama3'")),
    "longrope": (
        LLAMA,
        {"rope_scaling": {"rope_type": "longrope"}},
        ("short_factor", "32 numbers"),
    ),
    "mrope": (
        QWEN2,
        {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
        ("rope_type='mrope'",),
    ),
    "no factor": (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, ("factor is missing",)),
    "small factor": (LLAMA, llama3(factor=0.5), ("factor", "0.5")),
    "llama3 order": (LLAMA, llama3(high_freq_factor=1.0), ("high_freq_factor=1", "low")),
    "stray rope key": (LLAMA, llama3(beta_fast=32), ("beta_fast=32", "llama3")),
    "partial": (LLAMA, {"partial_rotary_factor": 0.5}, ("partial_rotary_factor=0.5",)),
    "yarn order": (
        QWEN3,
        {"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 2}},
        ("beta_fast=1", "beta_slow=2"),
    ),
    "yarn truncate": (QWEN3, {"rope_scaling": YARN | {"truncate": 1}}, ("truncate", "1")),
    "two ropes": (
        QWEN3,
        {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 2.0}},
        ("rope_scaling", "rope_parameters"),
    ),
    "nested rope": (QWEN3, {"rope_parameters": {F: YARN}}, (f"rope_parameters.{F}",)),
    "layer types length": (
        QWEN3,
        {"layer_types": [F]},
        ("layer_types has 1 entries", "num_hidden_layers=28"),
    ),
    "layer types kind": (QWEN3, {"layer_types": ["chunked"] * 28}, ("layer_types[0]='chunked'",)),
    "layer types string": (QWEN3, {"layer_types": F}, ("layer_types must be a list",)),
    "sliding off": (QWEN3, {"layer_types": [F] * 27 + [S]}, ("layer_types[27]", "sliding_window")),
    "zero window": (MISTRAL, {"sliding_window": 0}, ("sliding_window", "0")),
    "mixed mistral": (MISTRAL, {"layer_types": [S, F] * 16}, ("layer_types", "4096")),
    "bidirectional": (GEMMA3, {"use_bidirectional_attention": True}, ("use_bidirectional",)),
    "attention softcap": (GEMMA3, {"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping",)),
    "two activations": (GEMMA3, {"hidden_act": "silu"}, ("hidden_act", "hidden_activation")),
    "softcap zero": (GEMMA3, {"final_logit_softcapping": 0}, ("final_logit_softcapping", "0")),
    "scalar": (GEMMA3, {"query_pre_attn_scalar": 0}, ("query_pre_attn_scalar", "0")),
    "flat gemma rope": (
        GEMMA3,
        {"rope_parameters": {"rope_type": "default"}},
        ("rope_parameters.rope_type",),
    ),
    "windowless cwm": (CWM, {"sliding_window": None}, ("sliding_window", "layer_types")),
    "cwm bias": (CWM, {"attention_bias": True}, ("attention_bias=True",)),
    "qwen2 bias": (QWEN2, {"attention_bias": False}, ("attention_bias=False",)),
    "more experts a token": (
        QWEN3_MOE,
        {"num_experts_per_tok": 129},
        ("num_experts_per_tok", "129"),
    ),
    "two numbers of experts": (
        QWEN3_MOE,
        {"num_local_experts": 64},
        ("num_experts=128", "num_local_experts=64"),
    ),
    "sparse step": (QWEN3_MOE, {"decoder_sparse_step": 0}, ("decoder_sparse_step", "0")),
    "dense layers": (QWEN3_MOE, {"mlp_only_layers": [8]}, ("mlp_only_layers", "8")),
    "mixed windows": (
        QWEN3_MOE,
        {"sliding_window": 9, "use_sliding_window": True, "layer_types": [F, *[S] * 7]},
        ("layer_types",),
    ),
    "shared experts": (QWEN3_MOE, {"n_shared_experts": 1}, ("n_shared_experts=1",)),
    "latent heads": (DEEPSEEK_V3, {"num_key_value_heads": 8}, ("num_key_value_heads=8", "128")),
    "rotated part": (DEEPSEEK_V3, {"head_dim": 128}, ("head_dim=128", "qk_rope_head_dim=64")),
    "v3 scoring": (DEEPSEEK_V3, {"scoring_func": "softmax"}, ("scoring_func='softmax'",)),
    "v3 choice": (DEEPSEEK_V3, {"topk_method": "greedy"}, ("topk_method='greedy'",)),
    "v3 groups": (DEEPSEEK_V3, {"n_group": 7}, ("n_group=7", "n_routed_experts=256")),
    "v3 step": (DEEPSEEK_V3, {"moe_layer_freq": 2}, ("moe_layer_freq",)),
    "v2 choice": (DEEPSEEK_V2, {"topk_method": "noaux_tc"}, ("topk_method='noaux_tc'",)),
    "v2 weights": (DEEPSEEK_V2, {"norm_topk_prob": True}, ("norm_topk_prob=True",)),
    "v2 chosen": (DEEPSEEK_V2, {"num_experts_per_tok": 65}, ("num_experts_per_tok=65",)),
    "latent": (MINICPM3, {"kv_lora_rank": 0}, ("kv_lora_rank", "0")),
    "oss activation": (GPT_OSS, {"hidden_act": "gelu"}, ("hidden_act='gelu'",)),
    "oss experts twice": (GPT_OSS, {"experts_per_token": 2}, ("experts_per_token=2",)),
    "oss limit": (GPT_OSS, {"swiglu_limit": None}, ("swiglu_limit", "None")),
    "no text config": (GEMMA3, {"model_type": "gemma3"}, ("text_config",)),
    "other text config": (
        {"model_type": "gemma3"},
        {"text_config": {"model_type": "llama"}},
        ("text_config.model_type='llama'",),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_field_in_one_line(case: str) -> None:
    config, changes, words = REFUSED[case]
    merged = {k: v for k, v in (config | changes).items() if v is not ...}
    with pytest.raises(SkimpError) as caught:
        families.to_spec(merged)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    for word in words:
        assert word in message


def test_every_field_with_every_wrong_type() -> None:
    """No value of any field ends in anything but a spec or a one-line refusal."""
    values: list[Any] = [
        None,
        True,
        -1,
        0,
        2**63,
        1e400,
        math.nan,
        "",
        "x",
        [],
        [None],
        {},
        {"a": 1},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for config in CONFIGS.values():
            for field in [
                *config,
                "rope_parameters",
                "layer_types",
                "dtype",
                "quantization_config",
            ]:
                for value in values:
                    try:
                        spec = families.to_spec(config | {field: value})
                        assert families.to_spec(families.to_config(spec)) == spec
                    except SkimpError as error:
                        assert "\n" not in str(error)
            for key in ("rope_type", "type", "factor", "rope_theta", "low_freq_factor", "truncate"):
                for kind in ("linear", "llama3", "yarn", "default"):
                    for value in values:
                        scaling = LLAMA["rope_scaling"] | {"rope_type": kind, key: value}
                        try:
                            families.to_spec(config | {"rope_scaling": scaling})
                        except SkimpError as error:
                            assert "\n" not in str(error)


def test_tables_refuse_dynamic_beyond_its_range() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}
    spec = RopeSpec(theta=1e4, rotary_dim=8, scaling=scaling)
    assert rope_tables(spec, 64)[0].shape == (64, 4)
    with pytest.raises(ConfigError, match="max_positions=65"):
        rope_tables(spec, 65)


def test_tables_at_far_positions_equal_transformers() -> None:
    """Where float32 angles are coarse, the same coarse ones: bit for bit."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for scaling in (None, LLAMA["rope_scaling"], YARN):
        config = {k: v for k, v in LLAMA.items() if k != "model_type"} | {"rope_scaling": scaling}
        theirs = LlamaRotaryEmbedding(transformers.AutoConfig.for_model("llama", **config))
        positions = torch.arange(131000, 131072)
        cos, sin = theirs(torch.zeros(1), positions[None])
        rope = families.to_spec(config | {"model_type": "llama"}).layers[0].mixer.rope
        assert rope is not None
        ours = rope_tables(rope, 131072)
        assert torch.equal(ours[0][131000:], cos[0, :, :32])
        assert torch.equal(ours[1][131000:], sin[0, :, :32])
