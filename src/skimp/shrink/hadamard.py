"""Orthogonal matrices that spread outliers: Hadamard where one is known, else from a QR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

MatrixKind = Literal["hadamard", "random_hadamard", "orthogonal"]
DENSE_SIDE = 256  # a power-of-two Hadamard up to this size is applied as one product


@dataclass(frozen=True, kw_only=True, eq=False)
class Rotation:
    """The orthogonal matrix ``diag(signs) (left ⊗ right)``, float64, applied factor by factor."""

    left: Tensor  # [A, A]
    right: Tensor  # [B, B]
    signs: Tensor  # [A * B]

    @property
    def size(self) -> int:
        return self.left.shape[0] * self.right.shape[0]

    def apply(self, x: Tensor) -> Tensor:
        """``x @ R`` over the last axis; float64."""
        pairs = (x.double() * self.signs).unflatten(-1, (self.left.shape[0], self.right.shape[0]))
        return (self.left.T @ (pairs @ self.right)).flatten(-2)

    def matrix(self) -> Tensor:
        """R itself, [size, size]."""
        import torch

        return self.apply(torch.eye(self.size, dtype=torch.float64))


def rotation(size: int, kind: MatrixKind, seed: int) -> tuple[Rotation, bool]:
    """A rotation of ``size`` dimensions, and whether it is of the kind asked for: sizes without a
    known Hadamard matrix get a random orthogonal one."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    signs = torch.ones(size, dtype=torch.float64)
    if kind != "orthogonal":
        if kind == "random_hadamard":
            signs = torch.randint(2, (size,), generator=generator).double() * 2 - 1
        factors = _hadamard_factors(size)
        if factors is not None:
            return Rotation(left=factors[0], right=factors[1], signs=signs), True
    normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)  # uniform over the group (Mezzadri 2007)
    one = torch.ones(1, 1, dtype=torch.float64)
    plain = torch.ones(size, dtype=torch.float64)
    return Rotation(left=q, right=one, signs=plain), kind == "orthogonal"


def hadamard(size: int) -> Tensor | None:
    """A normalised Hadamard matrix [size, size], float64; None if this module knows none."""
    import torch

    factors = _hadamard_factors(size)
    return None if factors is None else torch.kron(*factors)


def _hadamard_factors(size: int) -> tuple[Tensor, Tensor] | None:
    """Two normalised Hadamard matrices whose Kronecker product has this size; the second is a
    power of two and both are small where that is possible."""
    power = size & -size
    block = 1
    if power != size:
        # The smallest block: its odd part is given, so only the twos in it are free.
        options = (size // power * 2**k for k in range(1, power.bit_length()))
        found = next((m for m in options if _paley(m) is not None), None)
        if found is None:
            return None
        block, power = found, size // found
    left_twos = max(1, power // DENSE_SIDE)
    paley = _paley(block)
    assert paley is not None
    import torch

    left = torch.kron(paley, _sylvester(left_twos))
    right = _sylvester(power // left_twos)
    return left / left.shape[0] ** 0.5, right / right.shape[0] ** 0.5


def _sylvester(size: int) -> Tensor:
    import torch

    h = torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while h.shape[0] < size:
        h = torch.kron(two, h)
    return h


def _paley(size: int) -> Tensor | None:
    """Paley's constructions (1933) over a prime q: size q + 1 with q = 3 mod 4, or 2 (q + 1) with
    q = 1 mod 4. Entries are 1 and -1."""
    import torch

    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size % 4:
        return None
    if _is_prime(size - 1):
        return torch.eye(size, dtype=torch.float64) + _conference(size - 1)
    q = size // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        on = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        eye = torch.eye(q + 1, dtype=torch.float64)
        return torch.kron(_conference(q), on) + torch.kron(eye, diagonal)
    return None


def _conference(q: int) -> Tensor:
    """The bordered matrix of quadratic characters of differences, [q + 1, q + 1]."""
    import torch

    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[(torch.arange(1, q) ** 2) % q] = 1.0
    character[0] = 0.0
    index = torch.arange(q)
    matrix = torch.ones(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 0] = 0.0
    matrix[1:, 0] = 1.0 if q % 4 == 1 else -1.0
    matrix[1:, 1:] = character[(index[:, None] - index[None, :]) % q]
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
