"""Serve large language models cheaply, and say honestly what the cheapness costs."""

__version__ = "0.1.0"
