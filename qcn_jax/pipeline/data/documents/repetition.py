"""Blocks of lines that come again: what a model has read once it need not learn to say again."""

import hashlib
from collections.abc import Iterator, Sequence

_BLOCK = 6  # lines that say something, one behind the other, that were seen before are masked
_TELLING = 12  # characters from which a line says something


def runs(text: str, seen: set[bytes]) -> Iterator[tuple[str, bool]]:
    """Cuts `text` at line starts into maximal runs of new lines and of lines in blocks that came before.

    Yields:
      (a run of lines, whether it repeats `seen` or what stands above it); `seen` grows by the blocks of `text`.
    """
    lines = text.splitlines(keepends=True)
    telling = [i for i, line in enumerate(lines) if line.strip()]
    repeated = [False] * len(lines)
    for first in range(len(telling) - _BLOCK + 1):
        block = telling[first:first + _BLOCK]
        key = _digest("\n".join(lines[i].strip() for i in block)) if _tells(lines, block) else None
        if key in seen:
            repeated[block[0]:block[-1] + 1] = [True] * (block[-1] - block[0] + 1)
        elif key is not None:
            seen.add(key)
    start = 0
    for i in range(1, len(lines) + 1):
        if i == len(lines) or repeated[i] != repeated[start]:
            yield "".join(lines[start:i]), repeated[start]
            start = i


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _tells(lines: Sequence[str], block: Sequence[int]) -> bool:
    """Blocks of closing brackets and the like recur without being copies."""
    return sum(len(lines[i].strip()) >= _TELLING for i in block) > _BLOCK // 2
