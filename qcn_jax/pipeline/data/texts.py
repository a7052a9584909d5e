"""Texts to learn from, on their way from somebody's files to documents: read once, filtered, kept on disk."""

import array
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from qcn_jax import files
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data import arrays

_ENDS = 4096  # of texts that are written at a time
_head = json.JSONEncoder().encode


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """A text and what is known of it.

    Attributes:
      path: within its repository.
      repo: texts of one repository have the same; empty where that is unknown.
      place: where it was read, FILE or FILE:LINE; not kept in a store.
    """

    text: str
    path: str = ""
    repo: str = ""
    language: str = ""
    licence: str = ""
    place: str = ""


class TextStore(Sequence[Text]):
    """Texts in a folder, memory-mapped, with random access; of each text 8 bytes are held in memory."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Opens a store that `write` made; raises UserError that names a file of it that is cut or missing."""
        self.folder = folder
        self.summary: dict[str, Any] = files.read_json(folder / "store.json")
        self._offsets = arrays.mapped(folder / "offsets.bin", np.int64, self.summary["texts"] + 1)
        self._bytes = arrays.mapped(folder / "texts.bin", np.uint8, self.summary["bytes"])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        record = self._bytes[self._offsets[index]:self._offsets[index + 1]].tobytes()
        end = record.index(b"\n")
        repo, path, language, licence = json.loads(record[:end])
        return Text(str(memoryview(record)[end + 1:], "utf-8", "surrogatepass"), path, repo, language, licence)

    @property
    def ends(self) -> np.ndarray:
        """Where each text ends among all bytes, int64 [len]: a text's share of them is the difference."""
        return self._offsets[1:]

    def repositories(self) -> Iterator[tuple[str, list[Text]]]:
        """Yields (name, texts) of every repository, in the order of their first texts; one is held at a time.

        A text of no repository is one of its own, without a name.
        """
        ranks = np.empty(len(self), np.int64)
        known: dict[str, int] = {}
        for index in range(len(self)):
            repo = self[index].repo
            ranks[index] = known.setdefault(repo, index) if repo else index
        order = np.argsort(ranks, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(ranks[order])) + 1) if len(order) else ():
            texts = [self[int(index)] for index in group]
            yield texts[0].repo, texts

    @staticmethod
    def exists(folder: pathlib.Path) -> bool:
        """Whether a complete store is in `folder`."""
        return (folder / "store.json").exists()

    @classmethod
    def write(cls, folder: pathlib.Path, texts: Iterable[Text], summary: Any = dict) -> "TextStore":
        """Writes a store, one text at a time; store.json comes last and marks it complete.

        Args:
          summary: called behind the last text, gives JSON-ready values to keep with the store.
        """
        count = size = characters = 0
        with contextlib.ExitStack() as stack:
            data = stack.enter_context(files.atomic_open(folder / "texts.bin", "wb"))
            offsets = stack.enter_context(files.atomic_open(folder / "offsets.bin", "wb"))
            ends = array.array("q", [0])
            for text in texts:
                head = _head([text.repo, text.path, text.language, text.licence]).encode()
                body = text.text.encode("utf-8", "surrogatepass")
                data.writelines((head, b"\n", body))
                count, size, characters = count + 1, size + len(head) + 1 + len(body), characters + len(text.text)
                ends.append(size)
                if len(ends) == _ENDS:
                    ends.tofile(offsets)
                    del ends[:]
            ends.tofile(offsets)
        files.write_json(folder / "store.json", {"texts": count, "bytes": size, "characters": characters, **summary()})
        return cls(folder)


class Findings:
    """What was read of a source and what became of it: rows that cannot be used, texts that a filter left out."""

    SHOWN = 20  # malformed rows that are kept by place and reason

    def __init__(self, malformed: str = "stop", field: str = "--config.midtrain.malformed") -> None:
        """`malformed` is what such a row does, stop or skip, as `field` says."""
        self._field, self._stops = field, malformed == "stop"
        self.read = self.kept = self.malformed = 0
        self.left_out: dict[str, int] = {}
        self.shown: list[str] = []

    def row(self, place: str, reason: str) -> None:
        """Notes a malformed row; raises UserError with file, line and reason where such rows are fatal."""
        if self._stops:
            raise UserError(f"{place}: {reason}; {self._field}=skip leaves such rows out")
        self.malformed += 1
        if len(self.shown) < self.SHOWN:
            self.shown.append(f"{place}: {reason}")

    def without(self, reason: str) -> None:
        """Counts a text that is left out for `reason`."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def summary(self) -> dict[str, Any]:
        """All counts, JSON-ready."""
        return {"read": self.read, "kept": self.kept, "malformed": self.malformed, "malformed_rows": self.shown,
                "left_out": dict(sorted(self.left_out.items()))}

    def line(self) -> str:
        """Says the counts in words."""
        words = [f"{self.kept:,} of {self.read:,} kept"]
        words += [f"{self.malformed:,} malformed ({self.shown[0]})"] if self.malformed else []
        words += [f"{count:,} left out: {reason}" for reason, count in sorted(self.left_out.items())]
        return ", ".join(words)
