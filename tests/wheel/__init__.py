"""The wheel, proved from outside the checkout: ``audit`` reads its shared objects, ``python -m tests.wheel`` runs it."""
