"""A small model inside a large one's shape: it says what the small one says, and costs what the
large one costs. So a large target can be had of which smaller models know what it will say.

The small model's stream is the first part of the large one's, which is 0 elsewhere; its heads, each
of half the width, are the first of each group; its layers lie between layers that add nothing. All
that meets only zeros is random. RMS norms see zeros too, and make up for them by their weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skimp.model.decoder import Decoder
from skimp.model.draft_head import DraftHead, HeadSpec
from skimp.model.loading import assign, empty_decoder
from skimp.model.spec import AttentionSpec, GatedFFNSpec, LayerSpec, ModelSpec


@dataclass(frozen=True)
class Shape:
    """Llama-3.1-8B's, but for its vocabulary."""

    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    inner: int = 14336


class Widener:
    def __init__(
        self, small: ModelSpec, shape: Shape, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.small, self.shape, self.device, self.dtype = small, shape, device, dtype
        mixer = small.layers[0].mixer
        assert isinstance(mixer, AttentionSpec) and mixer.rope is not None
        assert mixer.num_heads == mixer.num_kv_heads and not mixer.qk_norm
        assert shape.heads % mixer.num_heads == 0 and shape.layers % small.num_layers == 0
        self.old = mixer
        self.group = shape.heads // mixer.num_heads
        self.mixer = replace(
            mixer,
            num_heads=shape.heads,
            head_dim=2 * mixer.head_dim,
            rope=replace(mixer.rope, rotary_dim=2 * mixer.head_dim),
        )
        self.norm_factor = (small.hidden_size / shape.hidden) ** 0.5
        self.generator = torch.Generator(device).manual_seed(0)

    @property
    def eps(self) -> float:
        return self.small.norm_eps * self.norm_factor**2

    def spec(self) -> ModelSpec:
        layer = LayerSpec(mixer=self.mixer, ffn=GatedFFNSpec(intermediate_size=self.shape.inner))
        return replace(
            self.small,
            hidden_size=self.shape.hidden,
            layers=(layer,) * self.shape.layers,
            norm_eps=self.eps,
        )

    def head_spec(self, head: HeadSpec, inner: int) -> HeadSpec:
        """A head of the small model as one of the large: it reads the same streams."""
        apart = self.shape.layers // self.small.num_layers
        return replace(
            head,
            hidden_size=self.shape.hidden,
            taps=tuple(tap * apart for tap in head.taps),
            mixer=self.mixer,
            ffn=GatedFFNSpec(intermediate_size=inner),
            norm_eps=self.eps,
        )

    # ---- pieces ---------------------------------------------------------------------------

    def noise(self, *shape: int) -> Tensor:
        made = torch.empty(shape, device=self.device, dtype=self.dtype)
        return made.normal_(0.0, 0.02, generator=self.generator)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

    def norm(self, weight: Tensor) -> Tensor:
        made = torch.ones(self.shape.hidden, device=self.device, dtype=self.dtype)
        made[: len(weight)] = (weight.float() * self.norm_factor).to(made)
        return made

    def turned(self) -> Tensor:
        """Where the numbers of a small head lie in a large one, so that each keeps its angle."""
        half = self.old.head_dim // 2
        first = 2 * torch.arange(half)
        return torch.cat((first, first + 2 * half))

    def rows_of(self, heads: int, *, apart: int, turned: bool) -> Tensor:
        """Rows of a large projection for those of ``heads`` small heads, ``apart`` heads apart."""
        dim = self.old.head_dim
        within = self.turned() if turned else torch.arange(dim)
        return torch.cat([within + h * apart * 2 * dim for h in range(heads)])

    def into(
        self, weight: Tensor, old: Tensor, rows: Tensor | None, columns: Tensor | None
    ) -> Tensor:
        """``old`` inside ``weight``, at ``rows`` and ``columns`` (None: the first)."""
        rows = torch.arange(old.shape[0]) if rows is None else rows
        columns = torch.arange(old.shape[1]) if columns is None else columns
        at = (rows.to(self.device)[:, None], columns.to(self.device)[None, :])
        weight[at] = old.to(weight)
        return weight

    def queries(self) -> Tensor:
        return self.rows_of(self.old.num_heads, apart=self.group, turned=True)

    def keys(self) -> Tensor:
        return self.rows_of(self.old.num_kv_heads, apart=1, turned=True)

    def values(self) -> Tensor:
        return self.rows_of(self.old.num_kv_heads, apart=1, turned=False)

    def outputs(self) -> Tensor:
        return self.rows_of(self.old.num_heads, apart=self.group, turned=False)

    # ---- models ---------------------------------------------------------------------------

    def decoder(self, old: Decoder) -> Decoder:
        """``old`` is not bound, and its embeddings are tied."""
        assert self.small.tie_embeddings
        made = empty_decoder(self.spec())
        size, shape = self.small.hidden_size, self.shape
        apart = shape.layers // self.small.num_layers
        tensors = dict(old.named_parameters())
        table = self.zeros(self.small.vocab_size, shape.hidden)
        assign(
            made,
            "embed_tokens.weight",
            self.into(table, tensors["embed_tokens.weight"], None, None),
        )
        assign(made, "norm.weight", self.norm(tensors["norm.weight"]))
        wide = {name: p.shape for name, p in made.named_parameters()}
        for index in range(shape.layers):
            new, source = f"layers.{index}.", f"layers.{index // apart}."
            filled = index % apart == 0
            for part, rows, columns in (
                ("mixer.q_proj", self.queries(), None),
                ("mixer.k_proj", self.keys(), None),
                ("mixer.v_proj", self.values(), None),
                ("mixer.o_proj", None, self.outputs()),
                ("ffn.gate_proj", None, None),
                ("ffn.up_proj", None, None),
                ("ffn.down_proj", None, None),
            ):
                adds = part in ("mixer.o_proj", "ffn.down_proj")
                full = wide[f"{new}{part}.weight"]
                weight = self.zeros(*full) if adds else self.noise(*full)
                if filled:
                    self.into(weight, tensors[f"{source}{part}.weight"], rows, columns)
                assign(made, f"{new}{part}.weight", weight)
            for part in ("mixer_norm", "ffn_norm"):
                own = tensors[f"{source}{part}.weight"] if filled else torch.ones(size)
                assign(made, f"{new}{part}.weight", self.norm(own))
        return made

    def head(self, old: DraftHead, inner: int) -> DraftHead:
        """A head that guesses for the large model what ``old`` guesses for the small one."""
        with torch.device("meta"):
            made = DraftHead(self.head_spec(old.spec, inner))
        made.token_ids = old.token_ids.clone()
        tensors = dict(old.named_parameters())
        places = {
            "embed_qkv.0": (self.queries(), None),
            "embed_qkv.1": (self.keys(), None),
            "embed_qkv.2": (self.values(), None),
            "o_proj": (None, self.outputs()),
        }
        places |= {name.replace("embed", "feature"): at for name, at in places.items()}
        for name, parameter in list(made.named_parameters()):
            part = name.removesuffix(".weight")
            if parameter.dim() == 1:
                assign(made, name, self.norm(tensors[name]))
                continue
            adds = part in ("o_proj", "ffn.down_proj") or part.startswith("fusion.")
            weight = self.zeros(*parameter.shape) if adds else self.noise(*parameter.shape)
            assign(made, name, self.into(weight, tensors[name], *places.get(part, (None, None))))
        return made
