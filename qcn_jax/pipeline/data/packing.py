"""Packing documents into rows of one fixed length, so that no token of a step is wasted on padding.

Four methods (Table 13 of the report): `best_fit` keeps every document whole and fills rows by best-fit
decreasing; `pad_last` keeps documents whole in stream order and pads; `restart_last` fills the tail of a row
with the head of a document that starts again, whole, in the next row; `concat` cuts documents at row ends.
A document longer than a row is split, read through a sliding window, or dropped.

Segment ids let the model start afresh at every piece (attention, convolution window, recurrent state and
positions), so rows never leak between documents. Only numpy; the result depends on the input alone.
"""

import bisect
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from qcn_jax.errors import UserError

METHODS = ("best_fit", "restart_last", "pad_last", "concat")
OVERLONG = ("split", "slide", "drop")

Document = Mapping[str, np.ndarray | Sequence[float]]


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
    """What packing cost. Percentages as in the report's Table 13.

    fragmentation: share of pieces that are cut although their document fits into a row; padding: share of
    row positions that hold no token; overlong: documents longer than a row; dropped: those left out.
    """

    documents: int = 0
    pieces: int = 0
    fragments: int = 0
    overlong: int = 0
    dropped: int = 0
    tokens: int = 0
    positions: int = 0

    @property
    def fragmentation(self) -> float:
        """Per cent of the pieces."""
        return 100.0 * self.fragments / max(1, self.pieces)

    @property
    def padding(self) -> float:
        """Per cent of the positions."""
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
      overlong: what happens to documents longer than a row, one of OVERLONG; a sliding window moves by half
        a row. `concat` cuts every document alike and ignores it.
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
    pieces = _pieces(lengths, length, overlong)  # [n, 4]: document, start, stop, fresh
    sizes = pieces[:, 2] - pieces[:, 1]
    if method == "best_fit":
        order, row, column = _best_fit(sizes, length)
        return _plan(pieces[order], row, column)
    return _in_order(pieces, sizes, length, restart=method == "restart_last")


def statistics(lengths: Sequence[int] | np.ndarray, length: int, planned: Plan) -> PackingStatistics:
    """Counts what `planned` did with documents of these lengths in rows of `length`."""
    lengths = np.asarray(lengths, np.int64)
    whole = lengths[planned.document]
    size = planned.stop - planned.start
    return PackingStatistics(
        documents=len(lengths), pieces=len(size),
        fragments=int(np.sum((size < whole) & (whole <= length))),
        overlong=int(np.sum(lengths > length)),
        dropped=int(len(np.setdiff1d(np.flatnonzero(lengths), planned.document))),
        tokens=int(size.sum()), positions=planned.rows * length)


def fill(documents: Sequence[Document], planned: Plan, length: int,
         rows: int | None = None) -> dict[str, np.ndarray]:
    """Writes the planned pieces into arrays [rows, length]; `pack` says what they hold."""
    count = planned.rows if rows is None else -(-planned.rows // rows) * rows
    size = planned.stop - planned.start
    ends = np.cumsum(size)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - size, size)
    target = np.repeat(planned.row * length + planned.column, size) + within
    # Segment ids count the pieces of a row from 1; pieces come in row order.
    first = np.searchsorted(planned.row, planned.row, side="left")
    segment = np.arange(len(size)) - first + 1

    def scatter(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        out = np.zeros(count * length, dtype)
        out[target] = values
        return out.reshape(count, length)

    arrays = {
        "tokens": scatter(_gather(documents, "tokens", planned), np.int32),
        "segment_ids": scatter(np.repeat(segment, size), np.int32),
        "positions": scatter(within, np.int32),
    }
    # The last token of a piece has nothing to predict in its row; a window's context counted before.
    counts = within + np.repeat(planned.start, size) >= np.repeat(planned.fresh - 1, size)
    counts &= within < np.repeat(size - 1, size)
    weights = (_gather(documents, "weights", planned)
               if documents and "weights" in documents[0] else np.ones(len(within)))
    arrays["weights"] = scatter(weights * counts, np.float32)
    for key in documents[0] if documents else ():
        if key not in ("tokens", "weights"):
            values = _gather(documents, key, planned)
            arrays[key] = scatter(values, np.float32 if values.dtype.kind == "f" else np.int32)
    return arrays


def pack(documents: Sequence[Document], length: int, rows: int | None = None, method: str = "best_fit",
         overlong: str = "split") -> dict[str, np.ndarray]:
    """Packs documents into rows.

    Args:
      documents: each a mapping of equally long 1-D arrays: `tokens` (int), optionally `weights` (loss weight
        of predicting tokens[t + 1] from position t; default one), and any further per-token arrays.
      length: tokens of a row.
      rows: the number of rows is padded up to a multiple of this (None: as many as needed).
      method, overlong: see `plan`.
    Returns:
      [R, length] arrays: tokens, segment_ids (0 padding, 1.. pieces), positions (from 0 in each piece)
      int32; weights float32, zero at padding and at the last token of each piece; and the further arrays,
      zero at padding. With no documents and rows given: one batch of padding.
    """
    lengths = [len(document["tokens"]) for document in documents]
    planned = plan(lengths, length, method, overlong)
    if planned.rows == 0 and rows:
        planned = dataclasses.replace(planned, rows=rows)
    return fill(documents, planned, length, rows)


def _gather(documents: Sequence[Document], key: str, planned: Plan) -> np.ndarray:
    parts = [np.asarray(documents[d][key])[a:b] for d, a, b in
             zip(planned.document.tolist(), planned.start.tolist(), planned.stop.tolist())]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _pieces(lengths: np.ndarray, length: int, overlong: str) -> np.ndarray:
    """Rows (document, start, stop, fresh) of pieces no longer than a row, documents in order."""
    whole = np.flatnonzero((lengths > 0) & (lengths <= length))
    pieces = [(d, 0, n, 0) for d, n in zip(whole.tolist(), lengths[whole].tolist())]
    stride = length if overlong == "split" else max(1, length // 2)
    for d in np.flatnonzero(lengths > length).tolist() if overlong != "drop" else ():
        total, start, seen = int(lengths[d]), 0, 0
        while seen < total:
            stop = min(total, start + length)
            pieces.append((d, start, stop, seen))
            start, seen = start + stride, stop
    pieces.sort()
    return np.asarray(pieces, np.int64).reshape(-1, 4)


def _best_fit(sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best-fit decreasing: (order of pieces, row of each, column of each), all in row order."""
    decreasing = np.argsort(-sizes, kind="stable")
    rows_with: list[list[int]] = [[] for _ in range(length + 1)]  # by free positions
    capacities: list[int] = []  # sorted: free positions that some row has
    used = 0
    row = np.empty(len(sizes), np.int64)
    column = np.empty(len(sizes), np.int64)
    for i, size in enumerate(sizes[decreasing].tolist()):
        at = bisect.bisect_left(capacities, size)
        if at == len(capacities):
            target, free = used, length
            used += 1
        else:
            free = capacities[at]
            target = rows_with[free].pop()
            if not rows_with[free]:
                del capacities[at]
        row[i], column[i] = target, length - free
        left = free - size
        if left:
            if not rows_with[left]:
                bisect.insort(capacities, left)
            rows_with[left].append(target)
    by_row = np.argsort(row, kind="stable")
    return decreasing[by_row], row[by_row], column[by_row]


def _in_order(pieces: np.ndarray, sizes: np.ndarray, length: int, restart: bool) -> Plan:
    """Stream order; a piece that does not fit starts the next row, after its head filled this one if
    `restart`."""
    placed, row, column = [], [], []
    current, at = 0, 0
    for piece, size in zip(pieces.tolist(), sizes.tolist()):
        if at + size > length:
            if restart and at < length:
                document, start, _, fresh = piece
                placed.append((document, start, start + length - at, fresh))
                row.append(current)
                column.append(at)
            current, at = current + 1, 0
        placed.append(tuple(piece))
        row.append(current)
        column.append(at)
        at += size
    return _plan(np.asarray(placed, np.int64).reshape(-1, 4), np.asarray(row, np.int64),
                 np.asarray(column, np.int64))


def _concat(lengths: np.ndarray, length: int) -> Plan:
    """One stream of tokens cut every `length`: cuts are the union of document and row boundaries."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(np.concatenate([[0], ends]), np.arange(0, total, length)) if total else np.zeros(1, int)
    begin, end = cuts[:-1], cuts[1:]
    document = np.searchsorted(ends, begin, side="right")
    origin = (ends - lengths)[document] if total else begin
    pieces = np.stack([document, begin - origin, end - origin, begin - origin], axis=1).astype(np.int64)
    return _plan(pieces, begin // length, begin % length)


def _plan(pieces: np.ndarray, row: np.ndarray, column: np.ndarray) -> Plan:
    return Plan(pieces[:, 0], pieces[:, 1], pieces[:, 2], pieces[:, 3], row.astype(np.int64),
                column.astype(np.int64), int(row[-1]) + 1 if len(row) else 0)
