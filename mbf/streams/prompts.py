"""How a row is shown to the model: the text, the question, and then, after a space, the answer.

``<text>\\nWhat is the <noun> of the text? Answer: <answer><eos>``. Text and question are separate columns because only
whoever has the tokenizer can cut the text to its first tokens, and the question must survive the cut.
"""

from __future__ import annotations


def question(noun: str) -> str:
    """What follows the text in a classification task whose labels are each a ``noun``: "topic", "sentiment", ..."""
    return f"\nWhat is the {noun} of the text? Answer:"


def instruction(definition: str) -> str:
    """What follows the text where the task comes with its own words for what is asked."""
    return f"\n{definition.strip()}\nAnswer:" if definition.strip() else "\nAnswer:"
