"""Every family computes what transformers computes, in prefill and through a cache."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from skimp.decoding.params import SamplingParams
from skimp.engine import Engine, EngineOptions
from skimp.kernels import native
from skimp.model import families
from skimp.model.loading import load_decoder, load_spec

LENGTH = 70
TOLERANCE = 1e-4  # standard deviations of the logits

BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "q_lora_rank": None,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10,
    "v_head_dim": 14,
}
S, F = "sliding_attention", "full_attention"
CASES: dict[str, dict[str, Any]] = {
    "llama-gqa": {"model_type": "llama"},
    "llama-mha-tied": {
        "model_type": "llama",
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "llama-mqa-biases": {
        "model_type": "llama",
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama-wide-head": {"model_type": "llama", "head_dim": 22, "hidden_act": "gelu"},
    "llama-linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
    },
    "llama-llama3": {"model_type": "llama", "rope_parameters": LLAMA3, "head_dim": 64},
    "llama-yarn": {"model_type": "llama", "rope_parameters": YARN, "head_dim": 64},
    "llama-yarn-factor": {
        "model_type": "llama",
        "rope_parameters": YARN | {"attention_factor": 0.75, "beta_fast": 16.0, "beta_slow": 2.0},
        "head_dim": 64,
    },
    "llama-yarn-untruncated": {
        "model_type": "llama",
        "rope_parameters": YARN | {"truncate": False},
        "head_dim": 64,
    },
    "llama-yarn-mscale": {
        "model_type": "llama",
        "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
        "head_dim": 32,
    },
    "llama-dynamic": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1000.0},
    },
    "mistral-window": {"model_type": "mistral", "sliding_window": 7},
    "mistral-full": {"model_type": "mistral", "sliding_window": None, "head_dim": 20},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-upper-windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
    "qwen2-yarn": {"model_type": "qwen2", "rope_parameters": YARN, "head_dim": 64},
    "qwen3": {"model_type": "qwen3", "head_dim": 40},
    "qwen3-biased-windows": {
        "model_type": "qwen3",
        "head_dim": 16,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 1,
        "layer_types": [S, F, S],
    },
    "gemma2-softcaps": {
        "model_type": "gemma2",
        "head_dim": 24,
        "sliding_window": 9,
        "num_hidden_layers": 4,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
    },
    "gemma2-uncapped": {
        "model_type": "gemma2",
        "head_dim": 24,
        "sliding_window": 9,
        "layer_types": [F, S, F],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 24,
        "sliding_window": 9,
        "num_hidden_layers": 7,
        "query_pre_attn_scalar": 20,
    },
    "gemma3-softcap-ropes": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "sliding_window": 16,
        "layer_types": [F, S, S],
        "final_logit_softcapping": 2.0,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "rope_parameters": {
            F: {"rope_type": "linear", "factor": 8.0, "rope_theta": 40000.0},
            S: {"rope_type": "default", "rope_theta": 300.0},
        },
    },
    "gemma3-local-scaling": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "sliding_window": 16,
        "layer_types": [S, F, S],
        "rope_parameters": {
            F: YARN,
            S: {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0},
        },
    },
    "cwm": {
        "model_type": "cwm",
        "head_dim": 12,
        "sliding_window": 11,
        "num_hidden_layers": 5,
        "mlp_bias": True,
    },
    "deepseek-v3-dense": MLA | {"model_type": "deepseek_v3", "first_k_dense_replace": 3},
    "deepseek-v3-query-latent": MLA
    | {
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 3,
        "q_lora_rank": 24,
        "attention_bias": True,
        "rope_interleave": False,
        "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
        "qk_rope_head_dim": 16,
    },
    "deepseek-v2-dense": MLA
    | {
        "model_type": "deepseek_v2",
        "first_k_dense_replace": 3,
        "q_lora_rank": 24,
        "mlp_bias": True,
        "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
    },
    "deepseek-v3-experts": MLA
    | {
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.7,
    },
    "deepseek-v3-unnormalized": MLA
    | {
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 0,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
    },
    "deepseek-v2-greedy": MLA
    | {
        "model_type": "deepseek_v2",
        "first_k_dense_replace": 1,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "routed_scaling_factor": 1.3,
    },
    "deepseek-v2-limited": MLA
    | {
        "model_type": "deepseek_v2",
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "topk_method": "group_limited_greedy",
        "n_group": 3,
        "topk_group": 2,
    },
    "minicpm3": MLA
    | {
        "model_type": "minicpm3",
        "q_lora_rank": 24,
        "scale_depth": 1.4,
        "scale_emb": 3,
        "dim_model_base": 16,
        "rms_norm_eps": 1e-5,
    },
    "minicpm3-longrope": MLA
    | {
        "model_type": "minicpm3",
        "q_lora_rank": 24,
        "max_position_embeddings": 128,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.3, 1.9],
            "long_factor": [1.0, 2.3, 9.0],
            "original_max_position_embeddings": 128,
        },
    },
    "youtu": MLA | {"model_type": "youtu", "q_lora_rank": 24},
    "cwm-plain-rope": {
        "model_type": "cwm",
        "head_dim": 12,
        "sliding_window": 11,
        "layer_types": [S, S, F],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 28,
        "norm_topk_prob": True,
    },
    "qwen3-moe-some-layers": {
        "model_type": "qwen3_moe",
        "head_dim": 20,
        "num_hidden_layers": 5,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "attention_bias": True,
        "hidden_act": "gelu",
        "use_sliding_window": True,
        "sliding_window": 9,
    },
    "gpt-oss": {
        "model_type": "gpt_oss",
        "head_dim": 32,
        "sliding_window": 9,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "rope_parameters": YARN | {"truncate": False},
    },
    "gpt-oss-other-limits": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "sliding_window": 7,
        "layer_types": [F, S, S],
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "swiglu_alpha": 1.2,
        "swiglu_limit": 1.5,
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
}


def tokens() -> list[int]:
    return torch.randint(
        3, BASE["vocab_size"], (LENGTH,), generator=torch.Generator().manual_seed(3)
    ).tolist()


def backends(directory: Any) -> list[str]:
    missing = native.lacks(load_spec(directory))
    return ["plain"] if missing else ["plain", "native"]


@pytest.mark.filterwarnings("ignore:.*(dynamic|draft).*")
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, make_oracle: Any, tools: Any) -> None:
    oracle = make_oracle(BASE | CASES[case])
    expected = oracle.logits(tokens())
    assert expected.std() > 0.1
    whole = tools.whole(load_decoder(oracle.directory), tokens())
    assert tools.distance(whole, expected) < TOLERANCE
    for chunks in ([33, 1, 36], [LENGTH], [50] + [1] * 20):
        for backend in backends(oracle.directory):
            ours = tools.cached(load_decoder(oracle.directory), tokens(), chunks, backend)
            assert tools.distance(ours, expected) < TOLERANCE, (backend, chunks)


@pytest.mark.filterwarnings("ignore:.*(dynamic|draft).*")
@pytest.mark.parametrize("case", CASES)
def test_written_config_means_the_same(case: str, make_oracle: Any, tmp_path: Any) -> None:
    """transformers' config → spec → our config → transformers: every field is as it was."""
    from transformers import AutoConfig

    oracle = make_oracle(BASE | CASES[case])
    source = json.loads((oracle.directory / "config.json").read_text())
    spec = families.to_spec(source)
    ours = families.to_config(spec)
    assert families.to_spec(ours) == spec
    again = tmp_path / "again"
    again.mkdir()
    (again / "config.json").write_text(json.dumps(ours))
    first = AutoConfig.from_pretrained(oracle.directory).to_dict()
    second = AutoConfig.from_pretrained(again).to_dict()
    changed = {
        k: (first.get(k), second.get(k)) for k in first | second if first.get(k) != second.get(k)
    }
    # The folder differs; writing layer_types out makes max_window_layers a mere hint.
    for name in ("_name_or_path", "max_window_layers"):
        changed.pop(name, None)
    before, after = changed.pop("rope_parameters", ({}, {}))
    for name, value in before.items():  # defaults may have been written out, nothing else
        inner = after[name]
        assert inner == value or {k: inner[k] for k in value} == value, name
    assert not changed


def test_windows_matter(make_oracle: Any, tools: Any) -> None:
    """The parity above would not notice a window if no query reached past it."""
    import dataclasses

    from skimp.model.decoder import Decoder

    oracle = make_oracle(BASE | CASES["mistral-window"])
    decoder = load_decoder(oracle.directory)
    spec = decoder.spec
    layers = tuple(
        dataclasses.replace(x, mixer=dataclasses.replace(x.mixer, window=8)) for x in spec.layers
    )
    wider = Decoder(dataclasses.replace(spec, layers=layers))
    wider.load_state_dict(decoder.state_dict())
    assert tools.distance(tools.whole(wider, tokens()), oracle.logits(tokens())) > 0.01


@pytest.mark.parametrize("style", ["language_model.model.", "model.language_model."])
def test_multimodal_gemma_is_read_as_text(
    style: str, make_oracle: Any, tools: Any, tmp_path: Any
) -> None:
    from safetensors.torch import load_file, save_file

    oracle = make_oracle(BASE | CASES["gemma3"])
    text = json.loads((oracle.directory / "config.json").read_text())
    names = load_file(oracle.directory / "model.safetensors")
    renamed = {style + name.removeprefix("model."): t.clone() for name, t in names.items()}
    renamed["vision_tower.vision_model.post_layernorm.weight"] = torch.ones(3)
    renamed["multi_modal_projector.mm_soft_emb_norm.weight"] = torch.ones(3)
    wrapped = tmp_path / "wrapped"
    wrapped.mkdir()
    save_file(renamed, wrapped / "model.safetensors")
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {"hidden_size": 3, "model_type": "siglip_vision_model"},
        "eos_token_id": [1, 96],
        "torch_dtype": "float32",
    }
    (wrapped / "config.json").write_text(json.dumps(config))
    decoder = load_decoder(wrapped)
    assert decoder.spec.family == "gemma3_text"
    assert tools.distance(tools.whole(decoder, tokens()), oracle.logits(tokens())) < TOLERANCE


def test_a_real_model(shared: Any, tools: Any) -> None:
    transformers = pytest.importorskip("transformers")
    directory = shared / "models" / "stories260K"
    if not directory.is_dir():
        pytest.skip("no stories260K")
    ids = [1, 403, 407, 261, 378, *torch.arange(3, 300).tolist()]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    ours = tools.whole(load_decoder(directory), ids)
    assert tools.distance(ours, expected) < TOLERANCE
    for backend in ("plain", "native"):
        engine = Engine.load(directory, EngineOptions(backend=backend, threads=1))
        for prompt in ([1], [1, 403, 407, 261]):
            greedy = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
            reference = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=200,
                min_new_tokens=200,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            found = engine.generate([prompt], greedy)[0].outputs[0].token_ids
            assert prompt + found == reference[0].tolist(), backend
