"""Shortcuts that lower the bits of a weight."""
