"""The wheel: ``audit`` reads its shared objects, ``python -m tests.wheel`` uses it outside the checkout."""
