"""Weight formats: how a matrix is stored, and how checkpoints of other tools spell it."""

from skimp.formats.weight import QuantizedWeight, WeightFormat, quantize, round_to

__all__ = ["QuantizedWeight", "WeightFormat", "quantize", "round_to"]
