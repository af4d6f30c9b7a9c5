"""Commands of this repository: ``python -m tools <command>``."""
