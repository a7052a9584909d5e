"""Packing documents into rows of one fixed length, so that no token of a step is wasted on padding.

Four methods (Table 13 of the report): `best_fit` keeps every document whole and fills rows by best-fit
decreasing; `pad_last` keeps documents whole in stream order and pads; `restart_last` fills the tail of a row
with the head of a document that starts again, whole, in the next row; `concat` cuts documents at row ends.
A document longer than a row is split, dropped, or read through a window that slides by half a row: `slide` moves the
last window back to the document's end, so that it is full, `slide_merge` moves the one before it on to there instead,
which leaves one window fewer and that one less context.

Segment ids let the model start afresh at every piece (attention, convolution window, recurrent state and
positions), so rows never leak between documents. Only numpy; the result depends on the input alone.
"""

import array
import bisect
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from qcn_jax.errors import UserError

METHODS = ("best_fit", "restart_last", "pad_last", "concat")
OVERLONG = ("split", "slide", "slide_merge", "drop")

Document = Mapping[str, np.ndarray | Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Documents:
    """Many documents, one behind the other in arrays that all of them share.

    Attributes:
      lengths: tokens of each, int64 [n].
      begins: where each begins in the arrays, int64 [n].
      arrays: by name, `tokens` and `weights` among them: values of all tokens.
      heads: tokens of each one's head, int64 [n]; 0 where it has none.
    """

    lengths: np.ndarray
    begins: np.ndarray
    arrays: Mapping[str, np.ndarray]
    heads: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[Document]) -> "Documents":
        """Joins single documents, in their order; see `pack` for what they hold."""
        lengths = np.asarray([len(document["tokens"]) for document in documents], np.int64)
        names = [name for name, values in documents[0].items() if np.ndim(values)] if documents else []
        arrays = {name: np.concatenate([document[name] for document in documents]) for name in names}
        arrays.setdefault("tokens", np.zeros(0, np.int32))
        return cls.stored(lengths, arrays, np.asarray([document.get("head", 0) for document in documents], np.int64))

    @classmethod
    def stored(cls, lengths: np.ndarray, arrays: Mapping[str, np.ndarray], heads: np.ndarray) -> "Documents":
        """Documents that stand in `arrays` in their order; weights are one where there are none."""
        weights = arrays["weights"] if "weights" in arrays else np.ones(int(lengths.sum()), np.float32)
        return cls(lengths, np.cumsum(lengths) - lengths, {**arrays, "weights": weights}, heads)

    @classmethod
    def merged(cls, parts: Sequence["Documents"], places: Sequence[np.ndarray]) -> "Documents":
        """Joins parts, document i of part p at places[p][i], with the arrays that all of them have."""
        lengths, begins, heads = np.zeros((3, sum(map(len, places))), np.int64)
        offset = 0
        for part, place in zip(parts, places, strict=True):
            lengths[place], begins[place], heads[place] = part.lengths, part.begins + offset, part.heads
            offset += len(part.arrays["tokens"])
        names = [name for name in parts[0].arrays if all(name in part.arrays for part in parts)]
        arrays = {name: np.concatenate([part.arrays[name] for part in parts]) for name in names}
        return cls(lengths, begins, arrays, heads)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where each piece goes: five int64 arrays of one length, pieces in row order.

    Piece i is `document[i]`'s tokens [start[i], stop[i]), written to row[i] from column[i] on; `fresh[i]` is
    the first token whose prediction counts (a sliding window repeats its context without counting it).
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    fresh: np.ndarray
    row: np.ndarray
    column: np.ndarray
    rows: int


@dataclasses.dataclass(frozen=True)
class PackingStatistics:
    """What packing cost.

    Attributes:
      documents: how many there were.
      pieces: what became of them.
      fragmented: documents of which some piece is cut although they fit into a row.
      overlong: documents longer than a row.
      dropped: documents left out.
      heads: documents with a head, the turn that defines the tools of a conversation.
      cut_heads: those of them of which some piece lacks the head or a part of it.
      tokens: in all rows; what is written twice counts twice.
      positions: of all rows.
    """

    documents: int = 0
    pieces: int = 0
    fragmented: int = 0
    overlong: int = 0
    dropped: int = 0
    heads: int = 0
    cut_heads: int = 0
    tokens: int = 0
    positions: int = 0

    @property
    def fragmentation(self) -> float:
        """Fragmented documents, per cent of all documents (report, Table 13)."""
        return 100.0 * self.fragmented / max(1, self.documents)

    @property
    def padding(self) -> float:
        """Padding, per cent of all positions (report, Table 13)."""
        return 100.0 * (self.positions - self.tokens) / max(1, self.positions)

    def __add__(self, other: "PackingStatistics") -> "PackingStatistics":
        names = [field.name for field in dataclasses.fields(self)]
        return PackingStatistics(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def as_dict(self) -> dict[str, float]:
        """All counts and both percentages, for JSON."""
        return dataclasses.asdict(self) | {
            "fragmentation": round(self.fragmentation, 4), "padding": round(self.padding, 4)}


def plan(lengths: Sequence[int] | np.ndarray, length: int, method: str = "best_fit",
         overlong: str = "split") -> Plan:
    """Decides which tokens of which document go where.

    Args:
      lengths: tokens of each document; empty documents are left out.
      length: tokens of a row.
      method: one of METHODS.
      overlong: what happens to documents longer than a row, one of OVERLONG. `concat` cuts every document alike and
        ignores it.
    Raises:
      UserError: an unknown method.
    """
    if method not in METHODS:
        raise UserError(f"packing: unknown method {method!r}; allowed: {', '.join(METHODS)}")
    if overlong not in OVERLONG:
        raise UserError(f"packing: unknown overlong rule {overlong!r}; allowed: {', '.join(OVERLONG)}")
    lengths = np.asarray(lengths, np.int64)
    if method == "concat":
        return _concat(lengths, length)
    pieces = _pieces(lengths, length, overlong)  # [4, n]: document, start, stop, fresh
    sizes = pieces[2] - pieces[1]
    if method == "best_fit":
        order, row, column = _best_fit(sizes, length)
        return _plan(pieces[:, order], row, column)
    return _in_order(pieces, sizes, length, restart=method == "restart_last")


def statistics(lengths: Sequence[int] | np.ndarray, length: int, planned: Plan,
               heads: Sequence[int] | np.ndarray | None = None) -> PackingStatistics:
    """Counts what `planned` did with documents of these lengths in rows of `length`.

    Args:
      heads: tokens of each document's head, 0 where it has none.
    """
    lengths = np.asarray(lengths, np.int64)
    heads = np.zeros_like(lengths) if heads is None else np.asarray(heads, np.int64)
    whole, head = lengths[planned.document], heads[planned.document]
    size = planned.stop - planned.start

    def distinct(pieces: np.ndarray) -> int:
        seen = np.zeros(len(lengths), bool)
        seen[planned.document[pieces]] = True
        return int(seen.sum())

    return PackingStatistics(
        documents=len(lengths), pieces=len(size),
        fragmented=distinct((size < whole) & (whole <= length)),
        overlong=int(np.sum(lengths > length)),
        dropped=int(np.sum(lengths > 0)) - distinct(size > 0),
        heads=int(np.sum(heads > 0)), cut_heads=distinct((head > 0) & ((planned.start > 0) | (planned.stop < head))),
        tokens=int(size.sum()), positions=planned.rows * length)


def fill(documents: Documents, planned: Plan, length: int, rows: int | None = None) -> dict[str, np.ndarray]:
    """Writes the planned pieces into arrays [rows, length]; `pack` says what they hold."""
    count = planned.rows if rows is None else -(-planned.rows // rows) * rows
    size = planned.stop - planned.start
    at = planned.row * length + planned.column  # pieces come in this order
    runs = np.stack([size, np.diff(at, append=count * length) - size], axis=1).ravel()  # a piece and the gap behind it

    def spread(values: np.ndarray) -> np.ndarray:
        """[pieces] to every position of each piece, 0 in gaps."""
        if not len(values):
            return np.zeros(count * length, np.int32)
        return np.repeat(np.stack([values, np.zeros_like(values)], axis=1).ravel(), runs)

    # Segment ids count the pieces of a row from 1.
    segments = spread(np.arange(len(size)) - np.searchsorted(planned.row, planned.row, side="left") + 1)
    used = segments > 0
    positions = np.arange(count * length) - spread(at)
    origins = (positions + spread(documents.begins[planned.document] + planned.start))[used]

    def placed(values: np.ndarray) -> np.ndarray:
        dtype = np.float32 if values.dtype.kind == "f" else np.int32 if values.ndim == 1 else values.dtype
        out = np.zeros((count * length, *values.shape[1:]), dtype)
        out[used] = values[origins]
        return out

    arrays = {name: placed(values) for name, values in documents.arrays.items()}
    weights = arrays["weights"].astype(np.float32)
    weights[at + size - 1] = 0.0  # the last token of a piece has nothing to predict in its row
    for piece in np.flatnonzero(planned.fresh > planned.start).tolist():  # a window's context counted before
        weights[at[piece] : at[piece] + planned.fresh[piece] - planned.start[piece] - 1] = 0.0
    arrays |= {"segment_ids": segments.astype(np.int32), "weights": weights,
               "positions": (positions * used).astype(np.int32)}
    return {key: values.reshape(count, length, *values.shape[1:]) for key, values in arrays.items()}


def pack(documents: Sequence[Document], length: int, rows: int | None = None, method: str = "best_fit",
         overlong: str = "split") -> dict[str, np.ndarray]:
    """Packs documents into rows.

    Args:
      documents: each a mapping of equally long arrays: `tokens` (int), optionally `weights` (loss weight of
        predicting tokens[t + 1] from position t; default one), and any further per-token arrays, which may have more
        axes; what is no array says something of the document as a whole and is left out.
      length: tokens of a row.
      rows: the number of rows is padded up to a multiple of this (None: as many as needed).
      method, overlong: see `plan`.
    Returns:
      [R, length] arrays: tokens, segment_ids (0 padding, 1.. pieces), positions (from 0 in each piece)
      int32; weights float32, zero at padding and at the last token of each piece; and the further arrays,
      zero at padding. With no documents and rows given: one batch of padding.
    """
    together = Documents.of(documents)
    planned = plan(together.lengths, length, method, overlong)
    if planned.rows == 0 and rows:
        planned = dataclasses.replace(planned, rows=rows)
    return fill(together, planned, length, rows)


def _pieces(lengths: np.ndarray, length: int, overlong: str) -> np.ndarray:
    """Pieces no longer than a row, documents in order, [4, n]: document, start, stop, fresh."""
    stride = length if overlong == "split" else max(1, length // 2)
    beyond = np.maximum(lengths - length, 0)  # what the first window leaves
    merged = overlong == "slide_merge"
    more = np.maximum(beyond // stride, beyond > 0) if merged else -(-beyond // stride)
    count = np.where(lengths > 0, 1 + more, 0)
    if overlong == "drop":
        count[beyond > 0] = 0
    document = np.repeat(np.arange(len(lengths)), count)
    number = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    start = number * stride
    if overlong != "split":  # the last window ends with its document
        start = np.where((number > 0) & (number == more[document]), beyond[document], start)
    stop = np.minimum(start + length, lengths[document])
    fresh = np.where(number > 0, (number - 1) * stride + length, 0)  # where the window before ends
    return np.stack([document, start, stop, fresh])


def _best_fit(sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best-fit decreasing: (order of pieces, row of each, column of each), all in row order.

    Pieces go one by one, the longest first, to the row with the least room that is enough. Those of one size go to
    rows of one room together: such a row takes as many of them as fit, as it is the best one until it has no room for
    another. So the work grows with the number of different sizes and rooms rather than with that of pieces.
    """
    decreasing = np.argsort(-sizes, kind="stable")
    ordered = sizes[decreasing]
    begins = np.flatnonzero(np.diff(ordered, prepend=-1))
    counts = np.diff(begins, append=len(ordered))
    rows_with: list[list[int]] = [[] for _ in range(length + 1)]  # by their room
    rooms: list[int] = []  # sorted: those that some row has
    row, column = array.array("i"), array.array("i")
    used = 0

    def leave(rows: list[int], room: int) -> None:
        if rows and room:
            if not rows_with[room]:
                bisect.insort(rooms, room)
            rows_with[room] += rows

    for size, count in zip(ordered[begins].tolist(), counts.tolist()):
        while count:
            at = bisect.bisect_left(rooms, size)
            room = rooms[at] if at < len(rooms) else length
            each = room // size
            wanted = -(-count // each)
            if at == len(rooms):
                rows = list(range(used, used + wanted))
                used += wanted
            else:
                rows = rows_with[room][:-wanted - 1:-1]  # the last one that came to this room is the first to go
                del rows_with[room][-wanted:]
                if not rows_with[room]:
                    del rooms[at]
            taken, begin = min(count, each * len(rows)), length - room
            if each == 1:
                row.extend(rows)
                column.extend([begin] * taken)
                leave(rows, room - size)
            else:
                row.extend([number for number in rows for _ in range(each)][:taken])
                column.extend((list(range(begin, begin + each * size, size)) * len(rows))[:taken])
                full, rest = divmod(taken, each)
                leave(rows[:full], room - each * size)
                leave(rows[full:], room - rest * size)
            count -= taken
    rows_of, columns_of = np.frombuffer(row, np.int32), np.frombuffer(column, np.int32)
    by_row = np.argsort(rows_of, kind="stable")
    return decreasing[by_row], rows_of[by_row], columns_of[by_row]


def _in_order(pieces: np.ndarray, sizes: np.ndarray, length: int, restart: bool) -> Plan:
    """Stream order; a piece that does not fit starts the next row, after its head filled this one if `restart`."""
    ends = np.cumsum(sizes)
    first, taken = [], 0  # the first piece of every row; tokens before it
    while not first or first[-1] < len(sizes):
        first.append(int(np.searchsorted(ends, taken + length, side="right")) if first else 0)
        taken = int(ends[first[-1] - 1]) if first[-1] else 0
    first = np.asarray(first[:-1], np.int64)  # the last one is of no piece
    row = np.repeat(np.arange(len(first)), np.diff(first, append=len(sizes)))
    column = ends - sizes - (ends - sizes)[first][row]
    if restart:
        filled = np.diff((ends - sizes)[first])  # of every row but the last
        short = np.flatnonzero(filled < length)
        at = first[short + 1]
        heads = pieces[:, at]
        heads[2] = heads[1] + length - filled[short]
        pieces = np.insert(pieces, at, heads, axis=1)
        row, column = np.insert(row, at, short), np.insert(column, at, filled[short])
    return _plan(pieces, row, column)


def _concat(lengths: np.ndarray, length: int) -> Plan:
    """One stream of tokens cut every `length`: cuts are the union of document and row boundaries."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(np.concatenate([[0], ends]), np.arange(0, total, length)) if total else np.zeros(1, int)
    begin, end = cuts[:-1], cuts[1:]
    document = np.searchsorted(ends, begin, side="right")
    origin = (ends - lengths)[document] if total else begin
    pieces = np.stack([document, begin - origin, end - origin, begin - origin])
    return _plan(pieces, begin // length, begin % length)


def _plan(pieces: np.ndarray, row: np.ndarray, column: np.ndarray) -> Plan:
    return Plan(*pieces.astype(np.int64), row.astype(np.int64), column.astype(np.int64),
                int(row[-1]) + 1 if len(row) else 0)
