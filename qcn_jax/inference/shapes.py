"""Of which shape the next prefill call should be, where there are several.

A call costs about as much as its tokens, padding included, and as OVERHEAD more for each row and for itself (31M
parameters on two cores: 464 ms for 16 x 64 tokens, 124 for 4 x 64, 38 for 1 x 64, 198 for 16 x 16, 20 for 1 x 16).
Every shape is compiled when it is first wanted, so there are few.
"""

from collections.abc import Sequence

OVERHEAD = 16  # tokens


def palette(most: int, several: bool) -> tuple[int, ...]:
    """Sizes of one axis, the largest first: `most`, and with `several` a quarter of it, if that is less."""
    return tuple(dict.fromkeys((most, -(-most // 4)))) if several else (most,)


def lanes(most: int, several: bool, in_proportion: bool) -> tuple[int, ...]:
    """How many sequences a call of decoding may have, the largest first: `most`, and with `several` fewer and one.

    Where a step costs as much as its lanes (a processor: 25 ms for 96, 6 for 24, 1 for one with 1M parameters on two
    cores), halves down to an eighth; elsewhere the weights have to be read anyway, and a quarter will do.
    """
    fewer = [-(-most // part) for part in ((2, 4, 8) if in_proportion else (4,))] + [1]
    return tuple(dict.fromkeys((most, *(fewer if several else ()))))


def best(left: Sequence[Sequence[int]], rows: Sequence[int], chunks: Sequence[int]) -> tuple[int, int]:
    """The (rows, chunk) whose call takes in most for what it costs.

    Args:
      left: of every part, tokens that its sequences still lack, the longest first.
      rows, chunks: sizes to choose from, rows those of a part.
    """

    def worth(shape: tuple[int, int]) -> float:
        count, chunk = shape
        taken = sum(min(length, chunk) for part in left for length in part[:count])
        return taken / (OVERHEAD + count * (OVERHEAD + chunk))

    return max(((count, chunk) for count in rows for chunk in chunks), key=worth)
