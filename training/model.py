"""The Llama layout in plain PyTorch, made for training, and its files in Hugging Face layout.

Parameter names are those of transformers' `LlamaForCausalLM`, so saving is a copy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Sizes of a model."""

    hidden: int
    layers: int
    heads: int
    head_dim: int
    intermediate: int
    vocabulary: int = 8192
    context: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def to_json(self) -> dict[str, object]:
        """The `config.json` that transformers reads."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.context,
            "initializer_range": 0.02,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "use_cache": True,
            "bos_token_id": 0,
            "eos_token_id": [0, 2],
            "pad_token_id": 4,
            "torch_dtype": "bfloat16",
        }

    @staticmethod
    def from_json(data: dict) -> Config:
        """Sizes out of a `config.json` of this layout."""
        if data["num_key_value_heads"] != data["num_attention_heads"]:
            raise ValueError("only plain multi-head attention is trained here")
        return Config(
            hidden=data["hidden_size"],
            layers=data["num_hidden_layers"],
            heads=data["num_attention_heads"],
            head_dim=data["head_dim"],
            intermediate=data["intermediate_size"],
            vocabulary=data["vocab_size"],
            context=data["max_position_embeddings"],
            rope_theta=data["rope_theta"],
            norm_eps=data["rms_norm_eps"],
        )


CONFIGS = {
    "tales": Config(hidden=384, layers=8, heads=8, head_dim=64, intermediate=1024),
    "tales-draft": Config(hidden=128, layers=4, heads=4, head_dim=32, intermediate=384),
    "tiny": Config(hidden=64, layers=2, heads=2, head_dim=64, intermediate=128),
}


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 whatever comes in."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float()).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, the two halves of a head paired as transformers pairs them."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


class Attention(nn.Module):
    """Causal multi-head attention."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        width = config.heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden, width, bias=False)
        self.k_proj = nn.Linear(config.hidden, width, bias=False)
        self.v_proj = nn.Linear(config.hidden, width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        weight = torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)).to(x.dtype)
        qkv = F.linear(x, weight).view(batch, length, 3, self.heads, self.head_dim)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(batch, length, -1)
        return F.linear(y, self.o_proj.weight.to(x.dtype))


class MLP(nn.Module):
    """The gated feed-forward block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat((self.gate_proj.weight, self.up_proj.weight)).to(x.dtype)
        gate, up = F.linear(x, weight).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj.weight.to(x.dtype))


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Embedding, layers and last norm (`model.` in the parameter names)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)


class Llama(nn.Module):
    """A Llama with tied embeddings; computes in `dtype`, keeps its weights as they are."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.model = Body(config)
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        angles = torch.outer(torch.arange(config.context).float(), config.rope_theta**-half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def initialise(self, seed: int) -> None:
        """Fresh weights: normal, the last matrix of each block zero."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
            else:
                std = 0.02 if "embed" in name else 0.5 * parameter.shape[1] ** -0.5
                drawn = torch.randn(parameter.shape, generator=generator)
                with torch.no_grad():
                    parameter.copy_(drawn * std)

    def hidden(self, tokens: Tensor) -> Tensor:
        """The last hidden states, normed."""
        length = tokens.shape[1]
        if length > self.config.context:
            raise ValueError(f"{length} tokens are more than the context {self.config.context}")
        cos, sin = self.cos[:length], self.sin[:length]
        x = F.embedding(tokens, self.model.embed_tokens.weight).to(self.dtype)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self.model.norm(x)

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores of the next token after every position."""
        return F.linear(self.hidden(tokens), self.model.embed_tokens.weight.to(self.dtype))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats."""
        scores = self.logits(tokens).flatten(0, 1).float()
        return F.cross_entropy(scores, targets.flatten())

    def parameters_count(self) -> int:
        """How many numbers the model has."""
        return sum(p.numel() for p in self.parameters())


def save_model(model: Llama, folder: Path) -> None:
    """Write `config.json`, `generation_config.json` and bf16 `model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(model.config.to_json(), indent=2) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")
    generation = {
        "bos_token_id": 0,
        "eos_token_id": [0, 2],
        "pad_token_id": 4,
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
    }
    text = json.dumps(generation, indent=2) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    weights = {
        name: parameter.detach().to("cpu", torch.bfloat16).contiguous()
        for name, parameter in model.named_parameters()
    }
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})


def load_model(folder: Path, device: str, dtype: torch.dtype = torch.float32) -> Llama:
    """Read a folder that `save_model` wrote; the weights become float32, exactly."""
    path = folder / "config.json"
    if not path.is_file():
        raise SystemExit(f"no config.json in {folder}")
    model = Llama(Config.from_json(json.loads(path.read_text(encoding="utf-8"))), dtype)
    weights = load_file(str(folder / "model.safetensors"))
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.to(device).eval()
