"""What a draft head begins as: its shape and its first weights, both from the target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from skimp.draft.files import default_taps, empty_head
from skimp.draft.options import TrainOptions
from skimp.errors import OptionError
from skimp.model.decoder import Decoder, DecoderLayer
from skimp.model.draft_head import HeadSpec
from skimp.model.ffn import GatedFFN
from skimp.model.layers import Linear
from skimp.model.mixers.attention import Attention
from skimp.model.spec import AttentionSpec, GatedFFNSpec, ModelSpec, RopeSpec

# Of the standard deviation that keeps a product's size: what is added to the stream begins small,
# and so do the shallower taps and the tokens beside a feature that a lent layer knows to read.
ADDED: Final = 0.5
SHALLOW: Final = 0.05
BESIDE: Final = 0.3
USUAL_HEAD_DIM: Final = 128
USUAL_KV_HEADS: Final = 8
KEPT_SCALINGS: Final = (None, "linear", "llama3", "yarn")


def head_spec(target: ModelSpec, options: TrainOptions, words: int) -> HeadSpec:
    """The shape of a head that can guess ``words`` words: of the target's first layers of plain
    attention and of plain feed-forward, or the usual ones where it has none. Raises OptionError or
    ConfigError naming the field."""
    size = target.hidden_size
    mixers = [m for layer in target.layers if isinstance(m := layer.mixer, AttentionSpec)]
    ffns = [f for layer in target.layers if isinstance(f := layer.ffn, GatedFFNSpec)]
    dim = mixers[0].head_dim if mixers else min(USUAL_HEAD_DIM, size)
    heads = options.heads or (mixers[0].num_heads if mixers else max(1, size // dim))
    own = mixers[0].num_kv_heads if mixers else USUAL_KV_HEADS
    groups = options.kv_heads or math.gcd(own, heads)
    if heads % groups:
        raise OptionError(f"kv_heads: {groups} do not divide {heads} heads")
    inner = options.ffn or (ffns[0].intermediate_size if ffns else _usual_width(size))
    taps = options.layers or default_taps(target.num_layers)
    if sorted(set(taps)) != list(taps) or not 0 <= taps[0] <= taps[-1] <= target.num_layers:
        given = ",".join(map(str, taps))
        raise OptionError(f"layers: {given}: name layers in order, of 0 to {target.num_layers}")
    return HeadSpec(
        hidden_size=size,
        vocab_size=target.vocab_size,
        draft_vocab_size=words,
        taps=tuple(taps),
        mixer=AttentionSpec(
            num_heads=heads,
            num_kv_heads=groups,
            head_dim=dim,
            rope=_rope(target, dim),
            scale=dim**-0.5,
        ),
        ffn=GatedFFNSpec(intermediate_size=inner),
        norm_eps=target.norm_eps,
        max_positions=target.max_positions,
        dtype=target.dtype,
    )


def _usual_width(size: int) -> int:
    """Llama's 8 / 3 of the hidden size, in multiples of 64."""
    return max(64, 64 * round(size / 24))


def _rope(target: ModelSpec, dim: int) -> RopeSpec:
    """The target's, as far as a Llama has it: whole heads are turned, halves against halves."""
    ropes = [rope for layer in target.layers if (rope := layer.mixer.rope) is not None]
    if not ropes:
        return RopeSpec(theta=10_000.0, rotary_dim=dim)
    rope = ropes[0]
    kind = None if rope.scaling is None else rope.scaling["rope_type"]
    kept = rope.scaling if kind in KEPT_SCALINGS and not rope.interleaved else None
    return RopeSpec(theta=rope.theta, rotary_dim=dim, scaling=kept)


def choose_words(docs: Sequence[np.ndarray], vocab_size: int, words: int | None) -> Tensor:
    """The ``words`` tokens that ``docs`` have most often, the first of equals: ascending int64."""
    if words is None:
        return torch.arange(vocab_size)
    if words > vocab_size:
        raise OptionError(f"vocabulary: {words} words, and the target has {vocab_size}")
    counts = sum(
        (np.bincount(doc, minlength=vocab_size) for doc in docs), np.zeros(vocab_size, np.int64)
    )
    chosen = np.argsort(-counts, kind="stable")[:words]
    return torch.from_numpy(np.sort(chosen))


def start_tensors(spec: HeadSpec, target: Decoder, words: Tensor, seed: int) -> dict[str, Tensor]:
    """First weights, in the spec's dtype on the CPU. The output matrix is the target's rows, its
    logits' scale included, behind the target's last norm; the feature is the stream at the deepest
    tap; the layer is the target's last one if it is of this shape; all else is drawn."""
    dtype = getattr(torch, spec.dtype)
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name, parameter in empty_head(spec).named_parameters():
        if parameter.dim() == 1:
            found[name] = torch.ones(parameter.shape)
            continue
        deviation = parameter.shape[1] ** -0.5
        if name.startswith(("o_proj", "ffn.down_proj")):
            deviation *= ADDED
        elif name.startswith("fusion."):
            deviation *= SHALLOW
        found[name] = torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator)
    found[f"fusion.parts.{len(spec.taps) - 1}.weight"] = torch.eye(spec.hidden_size)
    found["norm.weight"] = target.norm.factor()
    found["lm_head.weight"] = _rows(target.head, words) * target.spec.logit_scale
    lent = _lent(spec, target)
    if "feature_qkv.0.weight" in lent:
        for i in range(3):
            found[f"embed_qkv.{i}.weight"] *= BESIDE
    return {name: tensor.cpu().to(dtype) for name, tensor in {**found, **lent}.items()}


def _lent(spec: HeadSpec, target: Decoder) -> dict[str, Tensor]:
    """What the target's last layer can give a head of this shape: as it has learned to turn such a
    stream into the next token, a head begins far ahead of a random one."""
    layer = target.layers[-1]
    assert isinstance(layer, DecoderLayer)
    if layer.spec.post_norms or layer.spec.residual_scale != 1.0:
        return {}
    found: dict[str, Tensor] = {}
    own = layer.mixer.spec if isinstance(layer.mixer, Attention) else None
    if own is not None and replace(own, window=None, rope=None) == replace(spec.mixer, rope=None):
        assert isinstance(layer.mixer, Attention)
        matrices = [layer.mixer.q_proj, layer.mixer.k_proj, layer.mixer.v_proj]
        for i, linear in enumerate(matrices):
            found[f"feature_qkv.{i}.weight"] = _rows(linear)
        found["o_proj.weight"] = _rows(layer.mixer.o_proj)
        found["feature_norm.weight"] = layer.mixer_norm.factor()
    if isinstance(layer.ffn, GatedFFN) and layer.ffn.spec == spec.ffn:
        for name in ("gate_proj", "up_proj", "down_proj"):
            found[f"ffn.{name}.weight"] = _rows(layer.ffn.get_submodule(name))
        found["ffn_norm.weight"] = layer.ffn_norm.factor()
    return found


def _rows(linear: nn.Module, rows: Tensor | None = None) -> Tensor:
    """float32 [N, K], or those ``rows`` of it."""
    assert isinstance(linear, Linear)
    if linear.quantized is not None:
        chosen = linear.quantized if rows is None else linear.quantized.rows(rows)
        return chosen.dequantize().float()
    assert linear.weight is not None
    weight = linear.weight.detach()
    return (weight if rows is None else weight[rows.to(weight.device)]).float()
