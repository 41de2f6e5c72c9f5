"""Fewer key-value heads for the same queries: statistics of heads, how alike they are, merging.

What may be done to a key head k, with the queries q that read it, without moving a logit: RoPE
turns each pair of dimensions by an angle of its own, so of linear maps only those commute with it
that multiply a pair, as a complex number, by a factor: ``k a`` and ``q / conj(a)``. Values have no
position, so any invertible matrix may pass between them and the output matrix. Heads merge into one
that each of them is such a map of, as nearly as can be.

Letters: G key-value heads, R query heads each, P pairs of dimensions, K = head_dim, M = K - 2 P
dimensions that RoPE leaves alone, D columns (the inputs and, with biases, one more).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from skimp.model.spec import AttentionSpec

Method = Literal["joint", "aligned"]
TINY: Final = 1e-300
FAINT: Final = 1e-12  # of the greatest weight, the least that a head has
RANK_TOLERANCE: Final = 1e-7  # of a root's greatest singular value, below which it reads nothing


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The matrices of attention by head, float64; biases are a last column of q, k and v."""

    q_GRKD: Tensor
    k_GKD: Tensor
    v_GKD: Tensor
    o_GRNK: Tensor  # N: what the output matrix writes
    sinks_GR: Tensor | None
    biased: bool

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], mixer: AttentionSpec) -> Self:
        """From a layer's tensors as :func:`~skimp.shrink.fold.wide` names them."""
        shape = mixer.num_kv_heads, mixer.num_heads // mixer.num_kv_heads

        def rows(name: str) -> Tensor:
            weight = tensors[f"mixer.{name}_proj.weight"]
            if mixer.qkv_bias:
                weight = torch.cat((weight, tensors[f"mixer.{name}_proj.bias"][:, None]), dim=1)
            return weight

        out = tensors["mixer.o_proj.weight"].unflatten(1, (*shape, mixer.head_dim))
        return cls(
            q_GRKD=rows("q").unflatten(0, (*shape, mixer.head_dim)),
            k_GKD=rows("k").unflatten(0, (shape[0], mixer.head_dim)),
            v_GKD=rows("v").unflatten(0, (shape[0], mixer.head_dim)),
            o_GRNK=out.permute(1, 2, 0, 3),
            sinks_GR=tensors["mixer.sinks"].view(shape) if mixer.sinks else None,
            biased=mixer.qkv_bias,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The reverse of :meth:`of`."""
        found = {"mixer.o_proj.weight": self.o_GRNK.permute(2, 0, 1, 3).flatten(1)}
        if self.sinks_GR is not None:
            found["mixer.sinks"] = self.sinks_GR.flatten()
        for name, rows in (("q", self.q_GRKD), ("k", self.k_GKD), ("v", self.v_GKD)):
            flat = rows.flatten(0, -2)
            if self.biased:
                found[f"mixer.{name}_proj.bias"] = flat[:, -1]
                flat = flat[:, :-1]
            found[f"mixer.{name}_proj.weight"] = flat
        return found


class Pairs:
    """Where RoPE's pairs lie in a head: ``first`` and ``second`` [P], and the ``rest``."""

    def __init__(self, mixer: AttentionSpec) -> None:
        turned = 0 if mixer.rope is None else mixer.rope.rotary_dim
        index = torch.arange(mixer.head_dim)
        if mixer.rope is not None and mixer.rope.interleaved:
            self.first, self.second = index[0:turned:2], index[1:turned:2]
        else:
            self.first, self.second = index[: turned // 2], index[turned // 2 : turned]
        self.rest = index[turned:]

    def complex(self, x: Tensor, dim: int) -> Tensor:
        """The pairs along ``dim`` as complex numbers."""
        return torch.complex(x.index_select(dim, self.first), x.index_select(dim, self.second))

    def put(self, into: Tensor, z: Tensor, dim: int) -> None:
        """The reverse of :meth:`complex`, in place."""
        into.index_copy_(dim, self.first, z.real)
        into.index_copy_(dim, self.second, z.imag)


@dataclass(frozen=True, kw_only=True)
class Norm:
    """Norms of q and k: their gains [K] and epsilon."""

    q_gain: Tensor
    k_gain: Tensor
    eps: float

    def shared(self, pairs: Pairs) -> Tensor:
        """Bool [P]: pairs whose two dimensions have the same gains, which a phase can pass."""
        alike = [g[pairs.first] == g[pairs.second] for g in (self.q_gain, self.k_gain)]
        return alike[0] & alike[1]


class Signals:
    """Second moments of queries, keys and values over the inputs of a layer, without centering."""

    def __init__(self, heads: Heads, pairs: Pairs, norm: Norm | None) -> None:
        self._heads, self._pairs, self._norm = heads, pairs, norm
        count, dim = heads.k_GKD.shape[:2]
        turned, rest = len(pairs.first), len(pairs.rest)
        wide = torch.float64
        self.keys_PGG = torch.zeros(turned, count, count, dtype=torch.complex128)
        self.queries_PG = torch.zeros(turned, count, dtype=wide)  # summed over a head's queries
        self.rest_keys = torch.zeros(count, rest, count, rest, dtype=wide)
        self.rest_queries_GMM = torch.zeros(count, rest, rest, dtype=wide)
        self.values = torch.zeros(count, dim, count, dim, dtype=wide)
        self.key_power_G = torch.zeros(count, dtype=wide)  # mean square before the norm
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Inputs [T, D] of q, k and v."""
        x = x.double()
        if self._heads.biased:
            x = torch.nn.functional.pad(x, (0, 1), value=1.0)
        q = torch.einsum("td,grkd->tgrk", x, self._heads.q_GRKD)
        k = torch.einsum("td,gkd->tgk", x, self._heads.k_GKD)
        v = torch.einsum("td,gkd->tgk", x, self._heads.v_GKD)
        self.key_power_G += k.square().mean(-1).sum(0)
        if self._norm is not None:
            q = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + self._norm.eps)
            k = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + self._norm.eps)
            q, k = q * self._norm.q_gain, k * self._norm.k_gain
        z = self._pairs.complex(k, 2)
        self.keys_PGG += torch.einsum("tap,tbp->pab", z, z.conj())
        self.queries_PG += self._pairs.complex(q, 3).abs().square().sum((0, 2)).T
        k, q = k[..., self._pairs.rest], q[..., self._pairs.rest]
        self.rest_keys += torch.einsum("tam,tbn->ambn", k, k)
        self.rest_queries_GMM += torch.einsum("tgrm,tgrn->gmn", q, q)
        flat = v.flatten(1)
        self.values += (flat.T @ flat).view(self.values.shape)
        self.rows += len(x)


@dataclass(frozen=True, kw_only=True)
class Merger:
    """Merges heads that were seen as ``signals``. ``weighted``: an error of a key counts as much as
    its queries are large, one of a value as much as the output matrix makes of it; else all count
    alike."""

    heads: Heads
    pairs: Pairs
    signals: Signals
    norm: Norm | None
    method: Method
    weighted: bool
    refit: bool

    def groups(self, count: int) -> list[list[int]]:
        """``count`` groups of equal size of the key-value heads that are alike."""
        return balanced_groups(self._distances(), count)

    def merged(self, groups: Sequence[Sequence[int]]) -> Heads:
        """One key-value head a group. Queries are reordered to stand with theirs."""
        old = self.heads
        q, o = old.q_GRKD.clone(), old.o_GRNK.clone()
        keys, values = [], []
        for group in groups:
            at = list(group)
            values.append(self._merge_values(at, o))
            keys.append(self._merge_keys(at, q))
        order = [head for group in groups for head in group]

        def regrouped(x: Tensor) -> Tensor:
            return x[order].unflatten(0, (len(groups), -1)).flatten(1, 2)

        return replace(
            old,
            q_GRKD=regrouped(q),
            k_GKD=torch.stack(keys),
            v_GKD=torch.stack(values),
            o_GRNK=regrouped(o),
            sinks_GR=None if old.sinks_GR is None else regrouped(old.sinks_GR),
        )

    # ---- values ---------------------------------------------------------------------------

    def _value_roots(self, at: list[int]) -> Tensor:
        """[g, K, K] whose products with values are as large as what those add to the stream."""
        o = self.heads.o_GRNK[at]
        if not self.weighted:
            return torch.eye(o.shape[-1], dtype=o.dtype).expand(len(at), -1, -1)
        return _root(torch.einsum("grnk,grnl->gkl", o, o))

    def _merge_values(self, at: list[int], o_GRNK: Tensor) -> Tensor:
        """The shared head [K, D]; the output matrix learns in place to read it."""
        moment = self.signals.values[at][:, :, at]
        encode, decode = self._basis(moment, self._value_roots(at))
        o_GRNK[at] = torch.einsum("grnk,gkl->grnl", o_GRNK[at], decode)
        return torch.einsum("kgl,gld->kd", encode, self.heads.v_GKD[at])

    def _basis(self, moment: Tensor, roots: Tensor) -> tuple[Tensor, Tensor]:
        """``encode`` [K, g, K] and ``decode`` [g, K, K] of heads whose mean of y yᵀ is ``moment``
        [g, K, g, K]: each y_i is about decode_i (encode y)."""
        if self.method == "joint":
            return _shared_basis(moment, roots)
        power = torch.einsum("gkl,glgm,gkm->g", roots, moment, roots)
        return _procrustes(moment, power if self.weighted else torch.ones_like(power))

    # ---- keys -----------------------------------------------------------------------------

    def _merge_keys(self, at: list[int], q_GRKD: Tensor) -> Tensor:
        """The shared head [K, D]; its queries are turned to it in place."""
        heads, pairs, norm = self.heads, self.pairs, self.norm
        old = heads.k_GKD[at]
        if norm is not None:  # the head's own length is lost in the norm
            old = old * torch.rsqrt(self.signals.key_power_G[at] / self.signals.rows)[:, None, None]
        new = torch.empty_like(old[0])
        z = pairs.complex(old, 1)
        encode, decode = self._pair_maps(at)
        pairs.put(new, torch.einsum("pg,gpd->pd", encode, z), 0)
        turned = pairs.complex(q_GRKD[at], 2) * decode.conj().T[:, None, :, None]
        queries = q_GRKD[at]
        pairs.put(queries, turned, 2)
        if len(pairs.rest):
            rest = pairs.rest
            moment = self.signals.rest_keys[at][:, :, at]
            roots = _root(self.signals.rest_queries_GMM[at])
            if not self.weighted:
                roots = torch.eye(len(rest), dtype=old.dtype).expand_as(roots)
            if norm is None:
                to, back = self._basis(moment, roots)
                new[rest] = torch.einsum("kgl,gld->kd", to, old[:, rest])
                queries[:, :, rest] = torch.einsum("grkd,gkl->grld", queries[:, :, rest], back)
            else:
                new[rest] = old[:, rest].mean(0)
        q_GRKD[at] = queries
        return new

    def _pair_maps(self, at: list[int]) -> tuple[Tensor, Tensor]:
        """Complex ``encode`` and ``decode`` [P, g] of the keys' pairs."""
        gram = self.signals.keys_PGG[:, at][:, :, at]
        weight = self.signals.queries_PG[:, at]
        if not self.weighted:
            weight = torch.ones_like(weight)
        # A head that asks next to nothing still has to be told what it would be told.
        least = FAINT * weight.amax(1, keepdim=True)
        weight = weight.maximum(least).clamp(min=TINY)
        if self.norm is None and self.method == "joint":
            return _shared_pairs(gram, weight)
        power = gram.diagonal(dim1=1, dim2=2).real
        row = torch.arange(len(gram))
        phase = gram[row, :, (power * weight).argmax(1)]  # of each head to the strongest
        if self.norm is not None:  # only a half turn passes unequal gains
            half = torch.where(phase.real < 0, -1.0, 1.0).to(phase.dtype)
            phase = torch.where(self.norm.shared(self.pairs)[:, None], phase, half)
        phase = torch.where(phase.abs() > TINY, phase / phase.abs().clamp(min=TINY), 1.0)
        encode = phase.conj() * (weight / weight.sum(1, keepdim=True))
        decode = phase
        if self.refit and self.norm is None:
            along = torch.einsum("pab,pb->pa", gram, encode.conj())
            length = torch.einsum("pa,pa->p", encode, along).real
            fitted = along / length.clamp(min=TINY)[:, None]
            decode = torch.where(length[:, None] > TINY, fitted, phase)
        return encode, decode

    # ---- likeness -------------------------------------------------------------------------

    def _distances(self) -> Tensor:
        """[G, G]: what merging two heads would lose at best, keys and values each as a share of
        what all heads have."""
        count = len(self.heads.k_GKD)
        key_total = value_total = 0.0
        keys, values = (torch.zeros(count, count, dtype=torch.float64) for _ in range(2))
        for a in range(count):
            key_total += self._key_loss([a])[1]
            value_total += self._value_loss([a])[1]
            for b in range(a):
                keys[a, b] = keys[b, a] = self._key_loss([a, b])[0]
                values[a, b] = values[b, a] = self._value_loss([a, b])[0]
        return keys / max(key_total, TINY) + values / max(value_total, TINY)

    def _value_loss(self, at: list[int]) -> tuple[float, float]:
        return _beyond_rank(self.signals.values[at][:, :, at], self._value_roots(at))

    def _key_loss(self, at: list[int]) -> tuple[float, float]:
        weight = self.signals.queries_PG[:, at].sqrt()
        if not self.weighted:
            weight = torch.ones_like(weight)
        gram = self.signals.keys_PGG[:, at][:, :, at] * weight[:, :, None] * weight[:, None, :]
        spread = torch.linalg.eigvalsh(gram)
        lost, total = float(spread[:, :-1].sum()), float(spread.sum())
        if len(self.pairs.rest):
            roots = _root(self.signals.rest_queries_GMM[at])
            more = _beyond_rank(self.signals.rest_keys[at][:, :, at], roots)
            lost, total = lost + more[0], total + more[1]
        return lost, total


def mean_heads(heads: Heads, count: int) -> Heads:
    """Neighbours averaged, as they are (Ainslie et al. 2023)."""
    size = len(heads.k_GKD) // count

    def pooled(x: Tensor) -> Tensor:
        return x.unflatten(0, (count, size)).mean(1)

    def gathered(x: Tensor) -> Tensor:
        return x.unflatten(0, (count, size)).flatten(1, 2)

    return replace(
        heads,
        q_GRKD=gathered(heads.q_GRKD),
        k_GKD=pooled(heads.k_GKD),
        v_GKD=pooled(heads.v_GKD),
        o_GRNK=gathered(heads.o_GRNK),
        sinks_GR=None if heads.sinks_GR is None else gathered(heads.sinks_GR),
    )


def balanced_groups(distances: Tensor, count: int) -> list[list[int]]:
    """Equal groups with little distance inside them, by swapping members of two groups as long as
    that helps, from two starts: neighbours, and groups grown one after another. float64 [G, G]."""
    size = len(distances) // count
    near = distances.tolist()
    starts = [[list(range(i * size, (i + 1) * size)) for i in range(count)], _grown(near, size)]
    found = [_swapped(near, groups) for groups in starts]
    best = min(found, key=lambda groups: sum(_inside(near, group) for group in groups))
    return sorted(sorted(group) for group in best)


def _grown(near: list[list[float]], size: int) -> list[list[int]]:
    left = list(range(len(near)))
    groups = []
    while left:
        group = [left.pop(0)]
        while len(group) < size:
            added = min(left, key=lambda x: sum(near[x][y] for y in group))
            left.remove(added)
            group.append(added)
        groups.append(group)
    return groups


def _swapped(near: list[list[float]], groups: list[list[int]]) -> list[list[int]]:
    def reach(x: int, group: list[int]) -> float:
        return sum(near[x][y] for y in group if y != x)

    helped = True
    while helped:
        helped = False
        for i, one in enumerate(groups):
            for two in groups[:i]:
                for a in range(len(one)):
                    for b in range(len(two)):
                        x, y = one[a], two[b]
                        before = reach(x, one) + reach(y, two)
                        after = reach(y, one) + reach(x, two) - 2 * near[x][y]
                        if after < before - 1e-12 * abs(before):
                            one[a], two[b] = y, x
                            helped = True
    return groups


def _inside(near: list[list[float]], group: list[int]) -> float:
    return sum(near[x][y] for x in group for y in group if x < y)


def _root(moments: Tensor) -> Tensor:
    """Symmetric square roots of positive semidefinite matrices [..., K, K]."""
    values, vectors = torch.linalg.eigh(moments)
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT


def _weighed(moment: Tensor, roots: Tensor) -> Tensor:
    """[g K, g K] of the heads' values as their readers see them."""
    weighed = torch.einsum("gkl,glhm,hnm->gkhn", roots, moment, roots)
    return weighed.flatten(2).flatten(0, 1)


def _beyond_rank(moment: Tensor, roots: Tensor) -> tuple[float, float]:
    """What of heads [g, K] no K numbers can hold, and all of it."""
    spread = torch.linalg.eigvalsh(_weighed(moment, roots)).clamp(min=0)
    return float(spread[: -roots.shape[-1]].sum()), float(spread.sum())


def _shared_basis(moment: Tensor, roots: Tensor) -> tuple[Tensor, Tensor]:
    """The K numbers that hold most of g heads: principal components of all of them together, each
    weighed by its root. The errors' sum of squares is the least that K numbers leave (Eckart &
    Young 1936)."""
    size, dim = roots.shape[:2]
    _, vectors = torch.linalg.eigh(_weighed(moment, roots))
    kept = vectors[:, -dim:].unflatten(0, (size, dim))
    encode = torch.einsum("glk,glm->kgm", kept, roots)
    decode = torch.linalg.pinv(roots, rtol=RANK_TOLERANCE) @ kept
    # Of the size that one of the heads has: the scale is free.
    own = torch.einsum("kgm,gmhn,khn->", encode, moment, encode)
    usual = torch.einsum("gmgm->", moment) / size
    scale = (usual / own.clamp(min=TINY)).sqrt() if own > TINY else torch.ones(())
    return encode * scale, decode / scale


def _procrustes(moment: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    """Heads turned to the strongest by orthogonal matrices, then averaged by ``power`` [g]."""
    u, _, vh = torch.linalg.svd(moment[:, :, int(power.argmax())])
    decode = u @ vh
    share = power / power.sum().clamp(min=TINY)
    return torch.einsum("g,glk->kgl", share, decode), decode


def _shared_pairs(gram: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of each pair, the one complex number that holds most of g heads' (the first principal
    component), their errors weighed by ``weight`` [P, g]."""
    root = weight.sqrt()
    _, vectors = torch.linalg.eigh(gram * root[:, :, None] * root[:, None, :])
    first = vectors[:, :, -1]
    encode, decode = first.conj() * root, first / root
    own = torch.einsum("pa,pab,pb->p", encode, gram, encode.conj()).real
    usual = gram.diagonal(dim1=1, dim2=2).real.mean(1)
    scale = torch.where(own > TINY, (usual / own.clamp(min=TINY)).sqrt(), 1.0)
    return encode * scale[:, None], decode / scale[:, None]
