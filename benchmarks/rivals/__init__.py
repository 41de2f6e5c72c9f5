"""Engines measured beside skimp, each run in its own process."""
