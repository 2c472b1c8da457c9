"""Fuzzers of the readers. See ``harness`` for what a target is; ``python -m tests.fuzz --help`` for the long form."""
