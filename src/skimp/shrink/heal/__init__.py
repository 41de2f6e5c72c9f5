"""Healing: what a shortcut broke is trained back, towards the original model's own predictions."""

from skimp.shrink.heal.step import Heal

__all__ = ["Heal"]
