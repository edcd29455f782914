"""Prompt look-up: propose what followed the last tokens the last time they stood in the text.

Source: Saxena 2023, "Prompt Lookup Decoding"; speculative decoding: Leviathan et al. 2023, arXiv 2211.17192.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 3, 1  # tokens that must agree


class LookUp:
    """Finds earlier occurrences of the newest tokens of one growing text. Cost: O(1) per token and per proposal."""

    def __init__(self) -> None:
        self._read = 0
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> position that follows its newest occurrence but the last

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that may follow `tokens`; tokens of earlier calls must not have changed."""
        size = len(tokens)
        for end in range(max(self._read, 1), size):  # an n-gram that ends here has a token after it
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                self._after[tuple(tokens[end - n : end])] = end
        self._read = size
        for n in range(min(LONGEST, size), SHORTEST - 1, -1):
            at = self._after.get(tuple(tokens[size - n :]))
            if at is not None:
                return _continued(tokens, at, count)
        return []


def _continued(tokens: Sequence[int], at: int, count: int) -> list[int]:
    """`count` tokens from `at` on; where they reach the end, the repetition goes on."""
    period = len(tokens) - at
    return [tokens[at + i % period] for i in range(count)]
