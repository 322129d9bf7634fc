"""Keys name sampling noise. Here: a batch number that nobody else has.

Two attempts under one key would be drawn with the same noise, so an engine takes a key only once
at a time. Used again later it draws the same tokens, which is what evaluations want.
"""

from itertools import count

_fresh_batches = count(2**40)  # far from any batch that a trainer numbers


def fresh_batch() -> int:
    """Returns a batch number for a key that no other call in this process gets.

    It is a count, not a random number: a program that is run twice gets the same ones.
    """
    return next(_fresh_batches)
