"""Binaries: `python -m giantsteps.experiments.train --help` and so on."""
