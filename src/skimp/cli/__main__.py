"""``python -m skimp.cli``."""

from skimp.cli import main

main()
