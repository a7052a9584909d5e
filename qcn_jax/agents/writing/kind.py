"""What kinds of written data share: items in, a model that is asked, rows out that checks bear out."""

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from qcn_jax import files
from qcn_jax.chat.asking import Ask
from qcn_jax.chat.endpoint import ContextExceeded
from qcn_jax.errors import UserError
from qcn_jax.journal import Rows


@dataclasses.dataclass(frozen=True)
class Item:
    """What a row is made of: its id, and its fields."""

    name: str
    fields: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Made:
    """Rows that an item gave, and why others were dropped, by reason."""

    rows: Sequence[Mapping[str, Any]] = ()
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Kind(Protocol):
    """A kind of data that a model writes."""

    name: str
    fields: Mapping[str, type]  # that a row of --data must have, with their types

    def check(self, fields: Mapping[str, Any]) -> str:
        """What else is wrong with an item; empty where nothing is."""

    def make(self, item: Item, ask: Ask, seed: int) -> Made:
        """Asks the model and checks what it says.

        Raises:
          UserError: the endpoint cannot be used.
        """


def read_items(path: str, kind: Kind, faults: list[str]) -> list[Item]:
    """Items of a JSONL file, or texts of a file or folder of pages (*.html, *.md, *.txt) where a text is all it takes.

    Raises:
      UserError: there is none that can be used; otherwise what is wrong with rows is added to `faults`.
    """
    place, found = pathlib.Path(path), []
    if not place.exists():
        raise UserError(f"--data={path}: no such file or folder")
    if place.suffix not in (".jsonl", ".ndjson") and set(kind.fields) == {"text"}:
        wanted = (".html", ".htm", ".md", ".txt")
        pages = sorted(p for p in place.rglob("*") if p.suffix in wanted) if place.is_dir() else [place]
        rows = [(str(page.relative_to(place)) if page != place else page.name,
                 {"text": page.read_text("utf-8", "replace")}) for page in pages]
    else:
        rows = [(f"{place.name}:{number}", row) for number, row in files.read_numbered(place, faults)]
    for name, row in rows:
        wrong = _wrong(row, kind)
        if wrong:
            faults.append(f"{name}: {wrong}")
        else:
            found.append(Item(str(row.get("id", name)), row))
    names = Counter(item.name for item in found)
    if doubled := next((name for name, count in names.items() if count > 1), None):
        raise UserError(f"--data={path}: id {doubled!r} is there {names[doubled]} times; ids must differ")
    if not found:
        raise UserError(faults[0] if faults else f"--data={path}: holds nothing for --kind={kind.name}")
    return found


def _wrong(row: Any, kind: Kind) -> str:
    if not isinstance(row, dict):
        return "must be an object"
    for field, wanted in kind.fields.items():
        if not isinstance(row.get(field), wanted) or not row[field]:
            return f"field {field}: must be a {'list' if wanted is list else 'text'} that holds something"
    return kind.check(row)


def make_all(items: Sequence[Item], kind: Kind, ask: Ask, rows: Rows, parallel: int, seed: int,
             progress: Callable[[Made], None]) -> Iterator[tuple[Item, Made]]:
    """Yields (item, what it gave) in order; what `rows`, a journal, has of unchanged items is not made again.

    Raises:
      UserError: the endpoint cannot be used; what was made before is kept.
    """
    keys = {item.name: f"{item.name} {_digest(item)}" for item in items}
    with rows, concurrent.futures.ThreadPoolExecutor(parallel) as threads:
        missing = [item for item in items if keys[item.name] not in rows.known]
        futures = {threads.submit(_made, kind, item, ask, seed): item for item in missing}
        try:
            for future in concurrent.futures.as_completed(futures):
                made = future.result()
                rows.add(keys[futures[future].name], {"rows": list(made.rows), "dropped": dict(made.dropped)})
                progress(made)
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
        known = dict(rows.known)
    for item in items:
        row = known[keys[item.name]]
        yield item, Made(row["rows"], row["dropped"])


def _made(kind: Kind, item: Item, ask: Ask, seed: int) -> Made:
    own = zlib.crc32(f"{seed} {item.name}".encode()) & 0x7FFFFFF  # room is left for further tries'
    try:
        return kind.make(item, ask, own)
    except ContextExceeded:  # this one alone; another may fit
        return Made(dropped={"too long": 1})


def _digest(item: Item) -> str:
    return hashlib.sha256(json.dumps(item.fields, sort_keys=True).encode()).hexdigest()[:16]


def shown(value: Any) -> str:
    """A JSON value for a prompt."""
    return json.dumps(value, ensure_ascii=False)
