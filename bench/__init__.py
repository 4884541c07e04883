"""Benches of fastkl: `python -m bench --help`, run from the repository root. Not installed with the package."""
