"""From documents to batches through Grain: shuffle, mix sources by share of tokens, pack, batch.

Everything is a function of (sources, seed): two iterators give the same batches, and an iterator whose state was
saved continues with the same batches, because the state is only positions.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, Protocol

import grain
import numpy as np

from qcn_jax import files
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data import arrays, packing

# Documents packed together hold this many rows' worth of tokens: enough that the last, part-filled row of a
# window costs under 1 % with documents of a tenth of a row.
WINDOW_ROWS = 64
_FRUITLESS = 10_000  # documents, of which none gave a row, until that is said
_CHUNK = 1 << 20  # values that are summed at a time
_SAMPLE = 64  # documents looked at to learn a source's mean length


class Documents(Protocol):
    """Random access to documents: mappings of equally long 1-D arrays with at least `tokens`.

    A number under `head` says how many tokens the turn has that defines the tools of a conversation.
    An endless source (one that makes documents up from the index) has no `__len__`.
    """

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """A named kind of documents and its share of the token stream, relative to the other shares."""

    name: str
    documents: Documents
    share: float


class TokenStore:
    """Documents as flat arrays in a folder, memory-mapped; the random-access form of what was tokenised once."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Opens a store that `write` made; raises UserError that names a file of it that is cut or missing."""
        stored = files.read_json(folder / "store.json")
        self._offsets = arrays.mapped(folder / "offsets.bin", np.int64, stored["documents"] + 1)
        sizes = {key: stored["documents" if key in stored["single"] else "tokens"] for key in stored["dtypes"]}
        self._arrays = {key: arrays.mapped(folder / f"{key}.bin", dtype, sizes[key])
                        for key, dtype in stored["dtypes"].items()}
        self._single = frozenset(stored["single"])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        a, b = self._offsets[index], self._offsets[index + 1]
        return {key: values[index] if key in self._single else values[a:b] for key, values in self._arrays.items()}

    def several(self, indices: np.ndarray) -> packing.Documents:
        """The documents of these numbers [n], in their order."""
        starts, stops = self._offsets[indices], self._offsets[indices + 1]
        parts = list(zip(starts.tolist(), stops.tolist(), strict=True))
        arrays = {key: np.concatenate([values[start:stop] for start, stop in parts])
                  for key, values in self._arrays.items() if key not in self._single}
        heads = self._arrays["head"][indices] if "head" in self._single else np.zeros(len(parts), np.int64)
        return packing.Documents.stored(stops - starts, arrays, heads)

    @property
    def tokens(self) -> int:
        """Number of tokens of all documents."""
        return int(self._offsets[-1])

    def total(self, key: str) -> int:
        """Sum of an array over all documents, rounded; read a part at a time."""
        values = self._arrays[key]
        return round(sum(float(values[at:at + _CHUNK].sum(dtype=np.float64)) for at in range(0, len(values), _CHUNK)))

    @staticmethod
    def exists(folder: pathlib.Path) -> bool:
        """Whether a complete store is in `folder`."""
        return (folder / "store.json").exists()

    @classmethod
    def write(cls, folder: pathlib.Path, documents: Iterable[Mapping[str, np.ndarray]]) -> "TokenStore":
        """Writes a store, one document at a time; store.json comes last and marks it complete.

        Args:
          documents: alike: arrays of a document's length, and single numbers of the document as a whole.

        Raises:
          UserError: there are no documents, or none that is not empty.
        """
        dtypes: dict[str, str] = {}
        single: list[str] = []
        count = tokens = 0
        with contextlib.ExitStack() as stack:
            streams: dict[str, IO[bytes]] = {}
            for document in documents:
                if not len(document["tokens"]):
                    continue
                if not streams:
                    dtypes = {key: "float32" if np.asarray(values).dtype.kind == "f" else "int32"
                              for key, values in document.items()}
                    single = [key for key, values in document.items() if not np.ndim(values)]
                    streams = {key: stack.enter_context(files.atomic_open(folder / f"{key}.bin", "wb"))
                               for key in ("offsets", *dtypes)}
                    streams["offsets"].write(np.int64(0).tobytes())
                for key, dtype in dtypes.items():
                    streams[key].write(np.asarray(document[key], dtype).tobytes())
                count, tokens = count + 1, tokens + len(document["tokens"])
                streams["offsets"].write(np.int64(tokens).tobytes())
        if not count:
            raise UserError(f"{folder}: there are no documents to train on")
        files.write_json(folder / "store.json",
                         {"dtypes": dtypes, "single": single, "documents": count, "tokens": tokens})
        return cls(folder)


def batches(sources: Sequence[Source], *, rows: int, length: int, seed: int, method: str = "best_fit",
            overlong: str = "split", origins: bool = False) -> grain.DatasetIterator:
    """An endless, checkpointable iterator of packed batches.

    Args:
      sources: those with a share of zero are left out; finite ones are shuffled anew every epoch.
      rows, length: shape of a batch, the same in every process: what is learned does not depend on their number.
      seed: decides order, mixture and every later epoch.
      method, overlong: see `packing.plan`.
      origins: rows have `source` [rows, length], too: the number, among those used, of the source of each token.
    Returns:
      Iterator of {tokens, segment_ids, positions, weights}: [rows, length], see `packing.pack`.
    Raises:
      UserError: no source has a share, or a source is empty; from the iterator: no document gives a row.
    """
    used = [source for source in sources if source.share > 0]
    if not used:
        raise UserError("the data mixture is empty: every share is 0")
    streams, document_shares, means = [], [], []
    for number, source in enumerate(used):
        streams.append(_stream(source, number, seed + 7919 * number))
        means.append(_mean_length(source))
        # Grain mixes documents, not tokens.
        document_shares.append(source.share / means[-1])
    total = sum(document_shares)
    mean = sum(m * s / total for m, s in zip(means, document_shares))
    mixed = grain.MapDataset.mix(streams, [s / total for s in document_shares])
    # No reader threads: documents are in memory or mapped, and the threads' bookkeeping cost more than reading.
    windows = _Windows(mixed, max(1, round(WINDOW_ROWS * length / mean))).to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    packed = _PackIterDataset(windows, used, length, method, overlong, seed, origins)
    return iter(packed.batch(rows, drop_remainder=True))


def statistics(iterator: grain.DatasetIterator) -> packing.PackingStatistics:
    """What packing did up to the current window of an iterator of `batches`."""
    return _packer(iterator).progress.packing


def summary(iterator: grain.DatasetIterator) -> dict[str, Any]:
    """`statistics` in JSON-ready form, with what else is known of packing.

    Returns:
      `method`, `rule` for overlong documents, counts and rates (see packing.PackingStatistics); `sources`: documents
      and tokens that were read of each; `variants`: fragmentation and padding of every method on the first window.
    """
    packer = _packer(iterator)
    dataset, progress = packer.dataset, packer.progress
    read = {name: {"documents": documents, "tokens": tokens}
            for (name, documents, tokens) in zip(
                [source.name for source in dataset.sources], progress.documents, progress.tokens, strict=True)}
    return {"method": dataset.method, "rule": dataset.overlong, **progress.packing.as_dict(), "sources": read,
            "variants": progress.variants}


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Words what `summary` gives, a line each: what packing cost, what other methods would, and whatever is amiss."""
    rates = lambda values: f"fragmentation {values['fragmentation']:.2f} %, padding {values['padding']:.2f} %"
    yield f"packing {found['method']}: {rates(found)}, {found['documents']:,} documents"
    if found["variants"]:
        yield "on the first documents: " + "; ".join(f"{name}: {rates(of)}" for name, of in found["variants"].items())
    if found["overlong"]:
        rule = f"{found['dropped']:,} of them dropped" if found["dropped"] else found["rule"]
        yield f"{found['overlong']:,} documents are longer than a row ({rule})"
    if found["cut_heads"]:
        yield (f"{found['cut_heads']:,} of {found['heads']:,} conversations are cut such that a piece lacks their tool "
               "definitions")
    for name, read in found["sources"].items():
        if not read["documents"]:
            yield f"{name}: no document of it was read; its share is too small for so few steps"


def _packer(iterator: grain.DatasetIterator) -> "_PackIterator":
    while not isinstance(iterator, _PackIterator):
        iterator = iterator._parents[0]  # Grain names no public way to the parent
    iterator.settle()
    return iterator


class _Numbers(grain.MapDataset):
    """(number of the source, number of a document); documents made from an index are as many as Grain can count."""

    def __init__(self, source: Source, number: int) -> None:
        super().__init__()
        self._number = number
        self._length = len(source.documents) if hasattr(source.documents, "__len__") else 2**40

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        return self.slice(index) if isinstance(index, slice) else (self._number, index % self._length)

    def _getitems(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        return [(self._number, index % self._length) for index in indices]


class _Windows(grain.MapDataset):
    """Lists of what follows one another.

    Grain's own `batch` asks for it one by one, which costs more than reading and packing documents.
    """

    def __init__(self, parent: grain.MapDataset, size: int) -> None:
        super().__init__(parent)
        self._size = size

    def __len__(self) -> int:
        return len(self._parent) // self._size

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        return self._parent._getitems(range(index * self._size, (index + 1) * self._size))


def _stream(source: Source, number: int, seed: int) -> grain.MapDataset:
    stream = _Numbers(source, number)
    if not hasattr(source.documents, "__len__"):
        return stream
    if not len(source.documents):
        raise UserError(f"data source {source.name}: 0 documents")
    return stream.seed(seed).shuffle().repeat()


def _mean_length(source: Source) -> float:
    count = len(source.documents) if hasattr(source.documents, "__len__") else _SAMPLE
    picks = np.unique(np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int))
    mean = float(np.mean([len(source.documents[int(i)]["tokens"]) for i in picks]))
    if not mean:
        raise UserError(f"data source {source.name}: its documents have no tokens")
    return mean


@dataclasses.dataclass(frozen=True)
class _Progress:
    """What has been read and packed: in all, documents and tokens of each source, and the methods' rates at first."""

    packing: packing.PackingStatistics
    documents: tuple[int, ...]
    tokens: tuple[int, ...]
    variants: Mapping[str, Mapping[str, float]]


class _PackIterDataset(grain.IterDataset):
    """Packs windows of documents into rows and shuffles the rows of a window."""

    def __init__(self, parent: grain.IterDataset, sources: Sequence[Source], length: int, method: str, overlong: str,
                 seed: int, origins: bool) -> None:
        super().__init__(parent)
        self.sources, self.length, self.method = sources, length, method
        self.overlong, self.seed, self.origins = overlong, seed, origins

    def __iter__(self) -> grain.DatasetIterator:
        return _PackIterator(iter(self._parent), self)


class _PackIterator(grain.DatasetIterator):
    """State: where the parent was when the window began, the window's number, rows given out, progress before."""

    def __init__(self, parent: grain.DatasetIterator, dataset: _PackIterDataset) -> None:
        super().__init__(parent)
        self.dataset = dataset
        self._begin = parent.get_state()
        self._number = 0
        self._given = 0
        self._documents = 0  # of the window
        self._rows: list[dict[str, np.ndarray]] | None = None
        none = (0,) * len(dataset.sources)
        self.progress = self._before = _Progress(packing.PackingStatistics(), none, none, {})

    def __next__(self) -> dict[str, np.ndarray]:
        if self._rows is None:
            self._rows = self._pack()
        fruitless = 0
        while self._given == len(self._rows):
            fruitless = 0 if self._rows else fruitless + self._documents
            if fruitless >= _FRUITLESS:
                raise UserError(f"none of {fruitless:,} documents fits into a row of {self.dataset.length} tokens, and "
                                f"overlong={self.dataset.overlong} leaves out all that do not")
            self._begin, self._before = self._parent.get_state(), self.progress
            self._number, self._given = self._number + 1, 0
            self._rows = self._pack()
        row = self._rows[self._given]
        self._given += 1
        return row

    def settle(self) -> None:
        """Packs the window of which rows were given out before the state was set: it is part of the progress."""
        if self._rows is None and self._given:
            self._rows = self._pack()

    def _pack(self) -> list[dict[str, np.ndarray]]:
        dataset, before = self.dataset, self._before
        origins, numbers = np.asarray(next(self._parent), np.int64).T
        self._documents = len(numbers)
        documents = _documents(dataset.sources, origins, numbers, dataset.origins)
        planned = packing.plan(documents.lengths, dataset.length, dataset.method, dataset.overlong)
        read = lambda before, weights: tuple(
            (np.asarray(before) + np.bincount(origins, weights, len(before)).astype(int)).tolist())
        self.progress = _Progress(
            before.packing + packing.statistics(documents.lengths, dataset.length, planned, documents.heads),
            read(before.documents, None), read(before.tokens, documents.lengths),
            before.variants or _variants(documents.lengths, dataset.length, dataset.overlong))
        filled = packing.fill(documents, planned, dataset.length)
        # Best-fit decreasing puts the longest documents first; steps should not see them in that order.
        order = np.random.default_rng([dataset.seed, self._number]).permutation(planned.rows)
        return [{key: values[row] for key, values in filled.items()} for row in order]

    def get_state(self) -> dict[str, Any]:
        return {"begin": self._begin, "number": self._number, "given": self._given,
                "progress": dataclasses.asdict(self._before)}

    def set_state(self, state: dict[str, Any]) -> None:
        self._begin, self._number, self._given = state["begin"], state["number"], state["given"]
        before = state["progress"]
        self.progress = self._before = _Progress(
            packing.PackingStatistics(**before["packing"]), tuple(before["documents"]), tuple(before["tokens"]),
            before["variants"])
        self._parent.set_state(self._begin)
        self._rows = None


def _documents(sources: Sequence[Source], origins: np.ndarray, numbers: np.ndarray, named: bool) -> packing.Documents:
    """Reads document numbers[i] of source origins[i], i in order; where `named`, with the array `source`."""
    parts, places = [], []
    for origin, source in enumerate(sources):
        place = np.flatnonzero(origins == origin)
        if len(place):
            several = getattr(source.documents, "several", None)
            wanted = numbers[place]
            part = several(wanted) if several else packing.Documents.of([source.documents[i] for i in wanted.tolist()])
            if named:
                arrays = {**part.arrays, "source": np.full(int(part.lengths.sum()), origin)}
                part = dataclasses.replace(part, arrays=arrays)
            parts.append(part)
            places.append(place)
    return packing.Documents.merged(parts, places)


def _variants(lengths: np.ndarray, length: int, overlong: str) -> dict[str, dict[str, float]]:
    """Fragmentation and padding of every method."""
    found = {method: packing.statistics(lengths, length, packing.plan(lengths, length, method, overlong))
             for method in packing.METHODS}
    return {method: {"fragmentation": round(values.fragmentation, 4), "padding": round(values.padding, 4)}
            for method, values in found.items()}
