"""PEFT's own tests with mbf's ``FusedLinear`` as PEFT's ``lora.Linear``: ``python -m tests.peft_suite --help``."""
