"""Shortcuts that lower the bits of a weight."""

from skimp.shrink.quantize.step import Quantize

__all__ = ["Quantize"]
