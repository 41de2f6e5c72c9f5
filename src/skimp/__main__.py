"""``python -m skimp``."""

from skimp.cli import main

main()
