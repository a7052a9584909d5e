"""Rows of JSONL and Parquet files: in their order, in bounded memory, each with its place."""

import codecs
import glob
import gzip
import io
import json
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

import orjson

from qcn_jax.errors import UserError
from qcn_jax.pipeline.data.texts import Findings

Row = dict[str, Any]
_PLAIN = {str, int, bool, type(None)}

LINES = (".jsonl", ".ndjson", ".json")  # a row a line, also behind one of COMPRESSED
COMPRESSED = (".gz", ".zst")
PARQUET = ".parquet"
TRAJECTORY = ".traj"  # SWE-agent's; one JSON value, over many lines
MAX_LINE = 64 << 20  # bytes of a row; longer ones are malformed
_MAX_DOCUMENT = 256 << 20  # bytes of a file that is one JSON value
_BATCH = 256  # rows of a Parquet file that are in memory at a time
_BUFFER = 1 << 20  # bytes of a column of it; without a bound the whole of a row group


def is_row_file(name: str) -> bool:
    """Tells by its name whether a file holds rows."""
    return _plain(name).endswith(LINES) or name.lower().endswith(PARQUET)


def _plain(name: str) -> str:
    name = name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return name


def matching(path: str, field: str) -> list[pathlib.Path]:
    """Files and folders that `path` names: itself, or what it matches as a glob, sorted.

    Raises:
      UserError: there is none, or nothing but empty files; the line begins with `field`.
    """
    if not path:
        raise UserError(f"{field}: is empty; allowed: a file, a folder or a glob such as data/*.jsonl.zst")
    plain = pathlib.Path(path).expanduser()
    found = [plain] if plain.exists() else sorted(map(pathlib.Path, glob.glob(str(plain), recursive=True)))
    if not found:
        words = "matches no file" if glob.has_magic(path) else "there is no such file or folder"
        raise UserError(f"{field}={path}: {words}")
    if all(file.is_file() and not file.stat().st_size for file in found):
        raise UserError(f"{field}={path}: is empty" + (f", all {len(found)} files of it" if len(found) > 1 else ""))
    return found


def row_files(paths: Sequence[pathlib.Path], trajectories: bool = False) -> list[pathlib.Path]:
    """The row files among `paths` and in the folders of them, hidden ones left out, in order.

    With `trajectories` .traj files are such, too, and of a folder with *.traj or *.traj.json these alone: what stands
    beside them tells of the run.
    """
    found: list[pathlib.Path] = []
    for path in paths:
        inside = [path] if path.is_file() else sorted(path.rglob("*"))
        files = [file for file in inside if file.is_file()
                 and (is_row_file(file.name) or trajectories and _plain(file.name).endswith(TRAJECTORY))
                 and not any(part.startswith(".") for part in file.relative_to(path).parts)]
        those = [file for file in files if _plain(file.name).endswith((TRAJECTORY, f"{TRAJECTORY}.json"))]
        found += those if trajectories and those else files
    return found


def read_document(path: pathlib.Path, findings: Findings) -> Any:
    """The value of a file that is one JSON value, not a row a line; None where it is rows, or malformed.

    A .json file is one where its first line is no object of its own and the whole is valid.
    """
    name = _plain(path.name)
    if not name.endswith((".json", TRAJECTORY)):
        return None
    try:
        with _opened(path) as stream:
            head = stream.readline(MAX_LINE + 1)
            if name.endswith(".json") and isinstance(_value(head), dict):
                return None
            data = head + stream.read(_MAX_DOCUMENT)
        if len(data) > _MAX_DOCUMENT:
            raise ValueError(f"is longer than {_MAX_DOCUMENT >> 20} MiB")
        value = json.loads(data.decode("utf-8-sig"))
        if not isinstance(value, dict | list):
            raise ValueError(f"expected an object or a list, got {type(value).__name__}")
        return value
    except (OSError, EOFError, zlib.error, ValueError, RecursionError, _arrow_error()) as error:
        if name.endswith(TRAJECTORY):
            findings.row(f"{path}:1", f"cannot be read as JSON: {first_line(error)}")
        return None


def _value(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _arrow_error() -> type[Exception]:
    import pyarrow

    return pyarrow.ArrowException


def read_rows(path: pathlib.Path, findings: Findings, columns: Sequence[str] | None = None
              ) -> Iterator[tuple[str, Row]]:
    """Yields (place, row) of a file, the place as FILE:NUMBER from 1: of its lines, or of a Parquet file's rows.

    Args:
      path: a file of which `is_row_file` is true.
      findings: is told of lines that are no JSON objects, and of a file that ends early or is no such file.
      columns: of a Parquet file, what is read of it where it is there; None for all.
    """
    if path.name.lower().endswith(PARQUET):
        yield from _of_parquet(path, findings, columns)
    else:
        yield from _of_lines(path, findings)


def _of_lines(path: pathlib.Path, findings: Findings) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        with _opened(path) as stream:
            while True:
                number += 1
                line, place = stream.readline(MAX_LINE + 1), f"{path}:{number}"
                if not line:
                    return
                if len(line) > MAX_LINE:
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(MAX_LINE)
                    findings.row(place, f"is longer than {MAX_LINE >> 20} MiB")
                elif not line.isspace():
                    row = _parsed(line, place, findings)
                    if row is not None:
                        yield place, row
    except (OSError, EOFError, zlib.error, _arrow_error()) as error:
        findings.row(f"{path}:{number}", f"cannot be read on: {first_line(error)}")


def _flat(line: bytes) -> Row | None:
    """A row of texts and plain values alone, five times as fast as the standard library; None where it is none.

    What is left to that library is what only it takes (a byte order mark, NaN, lone surrogates) or reads exactly (other
    numbers than short integers, which may be within other values), and the words for what is wrong.
    """
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and _PLAIN.issuperset(map(type, row.values())) else None


def _parsed(line: bytes, place: str, findings: Findings) -> Row | None:
    try:
        row = _flat(line)
        if row is None:
            row = json.loads(str(line.removeprefix(codecs.BOM_UTF8), "utf-8"))
    except UnicodeDecodeError as error:
        findings.row(place, f"is not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        array = line.lstrip().startswith(b"[") and not line.rstrip().endswith(b"]")
        hint = "; one array over many lines, give a row a line instead" if array else ""
        findings.row(place, f"is not valid JSON: {first_line(error)}{hint}")
    else:
        if isinstance(row, dict):
            return row
        findings.row(place, f"expected a JSON object, got {type(row).__name__}")
    return None


def _of_parquet(path: pathlib.Path, findings: Findings, columns: Sequence[str] | None) -> Iterator[tuple[str, Row]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path, buffer_size=_BUFFER) as file:
            names = file.schema_arrow.names
            wanted = None if columns is None else [name for name in names if name in columns]
            # Without any of them whole rows are read: whoever asked will name what the first one has instead.
            columns = wanted or None
            for group in range(file.num_row_groups):  # asked for all of them, it would read many ahead
                for batch in file.iter_batches(_BATCH, row_groups=[group], columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{path}:{number}", row
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        findings.row(f"{path}:{number + 1}", f"cannot be read as Parquet: {first_line(error)}")


def _opened(path: pathlib.Path) -> IO[bytes]:
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.open(path, "rb")
    if name.endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"), 1 << 20)
    return open(path, "rb")


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
