"""Texts of somebody's files: rows of JSONL and Parquet, folders and clones of source code, archives of it.

What a path is, is seen from its name and its inside: a file or folder of *.jsonl, *.ndjson, *.json (each also .gz or
.zst) or *.parquet is rows, one text each; any other folder, and *.tar.gz, *.tgz, *.tar.bz2, *.tar.xz, *.tar, *.zip and
*.whl, is a repository, each of its files one text.
"""

import dataclasses
import functools
import os
import pathlib
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qcn_jax.config import RunConfig, TextSource, from_config_dict
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data.readers import TextReader
from qcn_jax.pipeline.data.readers.rows import first_line, is_row_file, matching, read_rows, row_files
from qcn_jax.pipeline.data.texts import Findings, Text

if TYPE_CHECKING:
    from qcn_jax.pipeline.context import StageContext

# What the columns are usually called, the likeliest first.
USUAL = {
    "text": ("text", "content"),
    "repo": ("repo", "repo_name", "repository", "max_stars_repo_name"),
    "path": ("path", "file_path", "max_stars_repo_path"),
    "language": ("language", "lang", "programming_language"),
    "licence": ("licence", "license", "licenses", "max_stars_repo_licenses", "detected_licenses"),
}
ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar", ".zip", ".whl")
MAX_FILE = 1 << 20  # bytes of a repository's file; larger ones are data or tables
_SKIPPED = frozenset({"node_modules", "__pycache__"})  # beside hidden folders
_ABOUT = (".md", ".txt", ".json", ".yaml", ".yml")  # what stands beside rows to describe them


@dataclasses.dataclass(frozen=True)
class Columns:
    """What a source's `options` may hold: names of columns, by default the first of `USUAL` that a row has."""

    text: str = ""
    repo: str = ""
    path: str = ""
    language: str = ""
    licence: str = ""


class Files(TextReader):
    """See the module's docstring; nothing is left out unsaid."""

    def check(self, config: RunConfig, source: TextSource, field: str) -> None:
        """See TextReader; the first row or file is read, too."""
        columns = from_config_dict(Columns, source.options, f"{field.removeprefix('--')}.options")
        if source.form.startswith("pull_request"):
            raise UserError(f"{field}.kind: {source.kind!r}; form={source.form} is of kind=pull_requests")
        findings = Findings(config.midtrain.malformed)
        if next(_texts(source, columns, field, findings), None) is None:
            raise UserError(f"{field}: holds no text: {source.path} ({findings.line()})")

    def read(self, context: "StageContext", source: TextSource, findings: Findings) -> Iterator[Text]:
        """See TextReader."""
        columns, left = from_config_dict(Columns, source.options), source.megabytes * 1e6
        for text in _texts(source, columns, "--config.midtrain.sources", findings):
            yield text
            left -= len(text.text)
            if source.megabytes and left <= 0:
                return


FILES = Files()


def _texts(source: TextSource, columns: Columns, field: str, findings: Findings) -> Iterator[Text]:
    where = f"{field}.path" if ".sources" in field else field  # the short form names a path and nothing else
    for path in matching(source.path, where):
        if path.is_dir() and not _holds_rows(path):
            yield from _of_folder(path, findings)
        elif path.is_file() and path.name.endswith(ARCHIVES):
            yield from _of_archive(path, findings)
        elif path.is_dir() or is_row_file(path.name):
            for file in row_files([path]):
                yield from _of_rows(file, columns, findings)
        else:
            raise UserError(f"{where}: {path}: of an unknown kind; allowed: *.jsonl, *.ndjson, *.json (also .gz "
                            f"or .zst), *.parquet, {', '.join('*' + suffix for suffix in ARCHIVES)} or a folder")


def _of_rows(file: pathlib.Path, columns: Columns, findings: Findings) -> Iterator[Text]:
    given = dataclasses.asdict(columns)
    names = {key: (given[key],) if given[key] else USUAL[key] for key in USUAL}
    wanted = [name for group in names.values() for name in group]

    @functools.lru_cache(maxsize=64)  # rows of a file are mostly alike
    def chosen(keys: tuple[str, ...]) -> tuple[str | None, ...]:
        """Which column is the text, the path and so on; nothing where a wanted one is missing."""
        if any(name and name not in keys for name in given.values()):
            return (None,) * len(names)
        return tuple(next((name for name in names[key] if name in keys), None)
                     for key in ("text", "path", "repo", "language", "licence"))

    for place, row in read_rows(file, findings, wanted):
        findings.read += 1
        name, *others = chosen(tuple(row))
        if name is None:
            missing = next((name for name in given.values() if name and name not in row), None)
            findings.row(place, f"has no column {missing or ' or '.join(names['text'])}, only {_shown(row)}")
        elif not isinstance(row[name], str):
            findings.row(place, f"its text is {_kind(row[name])}, expected text")
        elif not row[name] or row[name].isspace():
            findings.without("empty")
        else:
            yield Text(row[name], *[_word(row[other]) if other else "" for other in others], place)


def _shown(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, list(row)[:8])) or "an empty object"


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _word(value: Any) -> str:
    """A column's value in one word or several with commas between; licences are often lists."""
    if isinstance(value, str):
        return value
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def _holds_rows(folder: pathlib.Path) -> bool:
    """Whether a folder is one of rows: there are some, and nothing but what describes them."""
    if (folder / ".git").exists():
        return False
    names = [path.name for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    rows = [name for name in names if is_row_file(name) and not name.endswith(".json")]
    return bool(rows) and all(is_row_file(name) or name.endswith(_ABOUT) for name in names)


def _of_folder(folder: pathlib.Path, findings: Findings) -> Iterator[Text]:
    """The files of a clone or other folder; of a folder of clones each is a repository."""
    clones = [path for path in sorted(folder.iterdir()) if (path / ".git").exists()]
    if clones and not (folder / ".git").exists():
        for clone in clones:
            yield from _of_folder(clone, findings)
        return
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED and not name.startswith("."))
        for name in sorted(names):
            path = pathlib.Path(place, name)
            if not name.startswith(".") and path.is_file() and not path.is_symlink():
                yield from _of_file(folder.resolve().name, path.relative_to(folder).as_posix(), str(path),
                                    path.stat().st_size, path.read_bytes, findings)


def _of_archive(archive: pathlib.Path, findings: Findings) -> Iterator[Text]:
    name = archive.name
    for suffix in ARCHIVES:
        name = name.removesuffix(suffix)
    try:
        for path, size, read in _members(archive):
            parts = pathlib.PurePosixPath(path).parts
            inner = "/".join(parts[1:] if parts[:1] == (name,) else parts)  # as source distributions are packed
            if not any(part in _SKIPPED or part.startswith(".") for part in parts):
                yield from _of_file(name, inner, f"{archive}:{path}", size, read, findings)
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, RuntimeError, ValueError) as error:
        findings.row(str(archive), f"cannot be read as an archive: {first_line(error)}")


def _members(archive: pathlib.Path) -> Iterator[tuple[str, int, Any]]:
    """(path, size, function that reads it) of every file of an archive, nothing of which is unpacked."""
    if archive.suffix in (".zip", ".whl"):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                if not info.is_dir():
                    yield info.filename, info.file_size, lambda info=info: opened.read(info)
    else:
        with tarfile.open(archive, "r|*") as stream:
            for member in stream:
                if member.isfile():
                    yield member.name, member.size, lambda member=member: stream.extractfile(member).read()


def _of_file(repo: str, path: str, place: str, size: int, read: Any, findings: Findings) -> Iterator[Text]:
    findings.read += 1
    if size > MAX_FILE:
        findings.without(f"files over {MAX_FILE >> 20} MiB")
        return
    data = read()
    try:
        text = data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        findings.without("not text")
    elif not text.strip():
        findings.without("empty")
    else:
        yield Text(text, path, repo, place=place)
