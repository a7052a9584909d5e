"""Rows of JSONL and Parquet files: in their order, in bounded memory, each with its place."""

import glob
import gzip
import io
import json
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

from qcn_jax.errors import UserError
from qcn_jax.pipeline.data.texts import Findings

Row = dict[str, Any]

LINES = (".jsonl", ".ndjson", ".json")  # a row a line, also behind one of COMPRESSED
COMPRESSED = (".gz", ".zst")
PARQUET = ".parquet"
MAX_LINE = 64 << 20  # bytes of a row; longer ones are malformed
_BATCH = 256  # rows of a Parquet file that are in memory at a time
_BUFFER = 1 << 20  # bytes of a column of it; without a bound the whole of a row group


def is_row_file(name: str) -> bool:
    """Tells by its name whether a file holds rows."""
    plain = name.lower()
    for suffix in COMPRESSED:
        plain = plain.removesuffix(suffix)
    return plain.endswith(LINES) or name.lower().endswith(PARQUET)


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


def row_files(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """The row files among `paths` and in the folders of them, hidden ones left out, in order."""
    found: list[pathlib.Path] = []
    for path in paths:
        inside = [path] if path.is_file() else sorted(path.rglob("*"))
        found += [file for file in inside if is_row_file(file.name) and file.is_file()
                  and not any(part.startswith(".") for part in file.relative_to(path).parts)]
    return found


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
    import pyarrow

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
                elif line.strip():
                    row = _parsed(line, place, findings)
                    if row is not None:
                        yield place, row
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        findings.row(f"{path}:{number}", f"cannot be read on: {first_line(error)}")


def _parsed(line: bytes, place: str, findings: Findings) -> Row | None:
    try:
        row = json.loads(line.decode("utf-8-sig"))
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
