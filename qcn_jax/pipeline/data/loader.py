"""From documents to batches through Grain: shuffle, mix sources by share of tokens, pack, batch.

Everything is a function of (sources, seed): two iterators give the same batches, and an iterator whose state was
saved continues with the same batches, because the state is only positions.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any, Protocol

import grain
import numpy as np

from qcn_jax import files
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data import arrays, packing

# Documents packed together hold this many rows' worth of tokens: enough that the last, part-filled row of a
# window costs under 1 % with documents of a tenth of a row.
_WINDOW_ROWS = 64
_CHUNK = 1 << 20  # values that are summed at a time
_SAMPLE = 64  # documents looked at to learn a source's mean length


class Documents(Protocol):
    """Random access to documents: mappings of equally long 1-D arrays with at least `tokens`.

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
        self._arrays = {key: arrays.mapped(folder / f"{key}.bin", dtype, stored["tokens"])
                        for key, dtype in stored["dtypes"].items()}

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        a, b = self._offsets[index], self._offsets[index + 1]
        return {key: np.asarray(values[a:b]) for key, values in self._arrays.items()}

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

        Raises:
          UserError: there are no documents, or none that is not empty.
        """
        dtypes: dict[str, str] = {}
        count = tokens = 0
        with contextlib.ExitStack() as stack:
            streams: dict[str, IO[bytes]] = {}
            for document in documents:
                if not len(document["tokens"]):
                    continue
                if not streams:
                    dtypes = {key: "float32" if np.asarray(values).dtype.kind == "f" else "int32"
                              for key, values in document.items()}
                    streams = {key: stack.enter_context(files.atomic_open(folder / f"{key}.bin", "wb"))
                               for key in ("offsets", *dtypes)}
                    streams["offsets"].write(np.int64(0).tobytes())
                for key, dtype in dtypes.items():
                    streams[key].write(np.asarray(document[key], dtype).tobytes())
                count, tokens = count + 1, tokens + len(document["tokens"])
                streams["offsets"].write(np.int64(tokens).tobytes())
        if not count:
            raise UserError(f"{folder}: there are no documents to train on")
        files.write_json(folder / "store.json", {"dtypes": dtypes, "documents": count, "tokens": tokens})
        return cls(folder)


def batches(sources: Sequence[Source], *, rows: int, length: int, seed: int, method: str = "best_fit",
            overlong: str = "split") -> grain.DatasetIterator:
    """An endless, checkpointable iterator of packed batches.

    Args:
      sources: those with a share of zero are left out; finite ones are shuffled anew every epoch.
      rows, length: shape of a batch, the same in every process: what is learned does not depend on their number.
      seed: decides order, mixture and every later epoch.
      method, overlong: see `packing.plan`.
    Returns:
      Iterator of {tokens, segment_ids, positions, weights}: [rows, length], see `packing.pack`.
    Raises:
      UserError: no source has a share, or a source is empty.
    """
    used = [source for source in sources if source.share > 0]
    if not used:
        raise UserError("the data mixture is empty: every share is 0")
    streams, document_shares, means = [], [], []
    for number, source in enumerate(used):
        streams.append(_stream(source, seed + 7919 * number))
        means.append(_mean_length(source))
        # Grain mixes documents, not tokens.
        document_shares.append(source.share / means[-1])
    total = sum(document_shares)
    mean = sum(m * s / total for m, s in zip(means, document_shares))
    mixed = grain.MapDataset.mix(streams, [s / total for s in document_shares])
    window = max(1, round(_WINDOW_ROWS * length / mean))
    # No reader threads: documents are in memory or mapped, and the threads' bookkeeping cost more than reading.
    stream = mixed.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    packed = _PackIterDataset(stream, window, length, method, overlong, seed)
    return iter(packed.batch(rows, drop_remainder=True))


def statistics(iterator: grain.DatasetIterator) -> packing.PackingStatistics:
    """What packing did up to the current window of an iterator of `batches`."""
    while not isinstance(iterator, _PackIterator):
        iterator = iterator._parents[0]  # Grain names no public way to the parent
    return iterator.statistics


class _Endless(grain.MapDataset):
    """Documents made from their index; as long as Grain can count."""

    def __init__(self, documents: Documents) -> None:
        super().__init__()
        self._documents = documents

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        return self._documents[int(index)]


def _stream(source: Source, seed: int) -> grain.MapDataset:
    if not hasattr(source.documents, "__len__"):
        return _Endless(source.documents)
    if not len(source.documents):
        raise UserError(f"data source {source.name}: 0 documents")
    return grain.MapDataset.source(source.documents).seed(seed).shuffle().repeat()


def _mean_length(source: Source) -> float:
    count = len(source.documents) if hasattr(source.documents, "__len__") else _SAMPLE
    picks = np.unique(np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int))
    return float(np.mean([len(source.documents[int(i)]["tokens"]) for i in picks]))


class _PackIterDataset(grain.IterDataset):
    """Packs windows of documents into rows and shuffles the rows of a window."""

    def __init__(self, parent: grain.IterDataset, window: int, length: int, method: str, overlong: str,
                 seed: int) -> None:
        super().__init__(parent)
        self.window, self.length, self.method, self.overlong, self.seed = window, length, method, overlong, seed

    def __iter__(self) -> grain.DatasetIterator:
        return _PackIterator(iter(self._parent), self)


class _PackIterator(grain.DatasetIterator):
    """State: where the parent was when the window began, the window's number, rows given out, statistics before."""

    def __init__(self, parent: grain.DatasetIterator, dataset: _PackIterDataset) -> None:
        super().__init__(parent)
        self._dataset = dataset
        self._begin = parent.get_state()
        self._number = 0
        self._given = 0
        self._rows: list[dict[str, np.ndarray]] | None = None
        self.statistics = self._before = packing.PackingStatistics()

    def __next__(self) -> dict[str, np.ndarray]:
        if self._rows is None:
            self._rows = self._pack()
        if self._given == len(self._rows):
            self._begin, self._before = self._parent.get_state(), self.statistics
            self._number, self._given = self._number + 1, 0
            self._rows = self._pack()
        row = self._rows[self._given]
        self._given += 1
        return row

    def _pack(self) -> list[dict[str, np.ndarray]]:
        dataset = self._dataset
        documents = [next(self._parent) for _ in range(dataset.window)]
        lengths = [len(document["tokens"]) for document in documents]
        planned = packing.plan(lengths, dataset.length, dataset.method, dataset.overlong)
        self.statistics = self._before + packing.statistics(lengths, dataset.length, planned)
        arrays = packing.fill(documents, planned, dataset.length)
        # Best-fit decreasing puts the longest documents first; steps should not see them in that order.
        order = np.random.default_rng([dataset.seed, self._number]).permutation(planned.rows)
        return [{key: values[row] for key, values in arrays.items()} for row in order]

    def get_state(self) -> dict[str, Any]:
        return {"begin": self._begin, "number": self._number, "given": self._given,
                "statistics": dataclasses.asdict(self._before)}

    def set_state(self, state: dict[str, Any]) -> None:
        self._begin, self._number, self._given = state["begin"], state["number"], state["given"]
        self.statistics = self._before = packing.PackingStatistics(**state["statistics"])
        self._parent.set_state(self._begin)
        self._rows = None
