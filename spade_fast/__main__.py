"""``python -m spade_fast`` is the command ``spade-fast``."""

from spade_fast.cli import main

main()
