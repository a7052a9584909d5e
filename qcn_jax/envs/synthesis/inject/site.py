"""What a transformation sees and gives: a place in a function, and edits of spans of its text."""

import dataclasses
import random
from collections.abc import Iterable, Mapping

import libcst as cst
from libcst.metadata import CodeSpan


@dataclasses.dataclass(frozen=True)
class Edit:
    """Replaces bytes [start, end) of the parsed text by `new`."""

    start: int
    end: int
    new: str


Edits = Iterable[Edit]


class Site:
    """The function around a node, and the source text of nodes.

    Attributes:
      rng: for a choice between equally good edits; seeded by the caller, so that results repeat.
      parents: the nodes around the current one, outermost first.
      names: the function's parameters and the local names bound before the current node, in source order.
    """

    def __init__(self, data: bytes, spans: Mapping[cst.CSTNode, CodeSpan], rng: random.Random):
        self.data = data
        self.rng = rng
        self.parents: list[cst.CSTNode] = []
        self.names: list[str] = []
        self._spans = spans

    @property
    def parent(self) -> cst.CSTNode:
        """The node directly around the current one."""
        return self.parents[-1]

    def span(self, node: cst.CSTNode) -> tuple[int, int]:
        """Bytes [start, end) of a node, without the parentheses around it."""
        span = self._spans[node]
        return span.start, span.start + span.length

    def text(self, node: cst.CSTNode) -> str:
        """The source text of a node, without the parentheses around it."""
        start, end = self.span(node)
        return self.data[start:end].decode()

    def replace(self, node: cst.CSTNode, new: str) -> Edit:
        """The edit that puts `new` in the place of a node."""
        return Edit(*self.span(node), new)

    def swap(self, first: cst.CSTNode, second: cst.CSTNode) -> Edit:
        """The edit that exchanges the texts of two nodes and keeps what stands between them."""
        (a, b), (c, d) = self.span(first), self.span(second)
        between = self.data[b:c].decode()
        return Edit(a, d, self.text(second) + between + self.text(first))

    def lines(self, first: cst.CSTNode, last: cst.CSTNode) -> tuple[int, int]:
        """Bytes of the whole lines from the start of `first` to the end of `last`, with the final newline."""
        start = self.data.rfind(b"\n", 0, self.span(first)[0]) + 1
        end = self.data.find(b"\n", self.span(last)[1])
        return start, (len(self.data) if end < 0 else end + 1)


def parenthesized(node: cst.CSTNode) -> bool:
    """Whether the expression carries parentheses of its own."""
    return bool(getattr(node, "lpar", ()))
