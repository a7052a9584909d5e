"""Pull requests of somebody's files: mined and made tasks with their repositories, or rows that bring their own files.

Rows (JSONL, Parquet, JSON lists) with columns for the description, the files before the change (a mapping of paths to
texts, or a list of objects with path and content, also as JSON text) and the change as a git diff; anything else is
read as tasks are (readers.task_sets), whose repositories are found beside them, given by `repositories`, or downloaded.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qcn_jax.config import RunConfig, TextSource, from_config_dict
from qcn_jax.envs import patches
from qcn_jax.envs.sandbox.repository import RepositorySpec, unpack
from qcn_jax.envs.synthesis import sources
from qcn_jax.envs.tasks.grading import starting_changes
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data.documents.pull_request import PullRequest
from qcn_jax.pipeline.data.documents.repository import MAX_FILE_BYTES, decoded
from qcn_jax.pipeline.data.readers import TextReader
from qcn_jax.pipeline.data.readers.published import rows_of
from qcn_jax.pipeline.data.readers.rows import matching, read_document, read_rows, row_files
from qcn_jax.pipeline.data.readers.task_sets import file_of, read_tasks
from qcn_jax.pipeline.data.texts import Findings, Text

if TYPE_CHECKING:
    from qcn_jax.pipeline.context import StageContext

NOISE = 8  # files that the change does not touch, which a pull request brings along, at most
_FIELD = "--config.midtrain.sources"


@dataclasses.dataclass(frozen=True)
class Options:
    """What a source's `options` may hold: names of columns, and where tasks' repositories are."""

    description: str = "description"
    files: str = "files"
    patch: str = "patch"
    repo: str = "repo"
    repositories: tuple[str, ...] = ()  # requirements, archives, folders, clones: as --config.tasks.repos_train


class PullRequests(TextReader):
    """See the module's docstring."""

    def check(self, config: RunConfig, source: TextSource, field: str) -> None:
        """See TextReader; the first row is read, too."""
        options = from_config_dict(Options, source.options, f"{field.removeprefix('--')}.options")
        if not source.form.startswith("pull_request") and ":" not in source.form:
            raise UserError(f"{field}.form: {source.form!r}; kind=pull_requests has the forms pull_request, "
                            "pull_request_edits and pull_request_diff")
        findings = Findings(config.midtrain.malformed)
        rows = _has_files(source.path, f"{field}.path", options, findings)
        read = _of_rows(source, options, findings) if rows else read_tasks(source.path, f"{field}.path", findings)
        if next(read, None) is None:
            raise UserError(f"{field}: holds no pull request: {source.path} ({findings.line()})")

    def read(self, context: "StageContext", source: TextSource, findings: Findings) -> Iterator[Text]:
        """See TextReader."""
        options, left = from_config_dict(Options, source.options), source.megabytes * 1e6
        rows = _has_files(source.path, "path", options, Findings("skip"))
        for text in (_of_rows if rows else _of_tasks)(source, options, findings):
            yield text
            left -= len(text.text)
            if source.megabytes and left <= 0:
                return


PULL_REQUESTS = PullRequests()


def _rows(file: pathlib.Path, findings: Findings) -> Iterator[tuple[str, Any]]:
    document = read_document(file, findings)
    if document is None:
        yield from read_rows(file, findings)
    else:
        yield from ((f"{file}:{number}", row) for number, row in enumerate(rows_of(document), 1))


def _has_files(path: str, field: str, options: Options, findings: Findings) -> bool:
    """Whether the first row brings its files."""
    for file in row_files(matching(path, field)):
        for _, row in _rows(file, findings):
            return isinstance(row, Mapping) and options.files in row
    return False


def _of_rows(source: TextSource, options: Options, findings: Findings) -> Iterator[Text]:
    for file in row_files(matching(source.path, "path")):
        for place, row in _rows(file, findings):
            findings.read += 1
            try:
                yield _of_row(row, options).to_text(place=place)
            except UserError as error:
                findings.row(place, str(error))


def _of_row(row: Any, options: Options) -> PullRequest:
    if not isinstance(row, Mapping):
        raise UserError(f"expected a JSON object, got {type(row).__name__}")
    texts = {}
    for name in (options.description, options.patch):
        texts[name] = row.get(name)
        if not isinstance(texts[name], str) or not texts[name].strip():
            raise UserError(f"its {name} is {type(row[name]).__name__ if name in row else 'missing'}, expected text")
    files = _files(row.get(options.files), options.files)
    repo = row.get(options.repo)
    return _made(repo if isinstance(repo, str) else "", texts[options.description], files, texts[options.patch])


def _files(value: Any, name: str) -> dict[str, str]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}: is not valid JSON") from error
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        value = {item.get("path"): item.get("content", item.get("text")) for item in value}
    if not isinstance(value, Mapping):
        raise UserError(f"{name}: expected paths and texts, got {type(value).__name__}")
    found = {path: text for path, text in value.items() if text is not None}  # Parquet fills what a row lacks
    if not all(isinstance(path, str) and path and isinstance(text, str) for path, text in found.items()):
        raise UserError(f"{name}: expected a text for every path")
    return found


def _made(repo: str, description: str, files: Mapping[str, str], patch: str) -> PullRequest:
    """The request with the files that it changes and the likeliest others: of the same folders, and mentioned."""
    try:
        changes = patches.apply_changes(files, patch)
    except patches.PatchError as error:
        raise UserError(f"its patch does not apply to its files: {error}") from error
    changes = {path: text for path, text in changes.items() if text != files.get(path)}
    if not changes:
        raise UserError("its patch changes nothing")
    folders = {path.rpartition("/")[0] for path in changes}
    said = description.lower()

    def distance(path: str) -> tuple[bool, bool, str]:
        folder, _, name = path.rpartition("/")
        return folder not in folders, name.partition(".")[0].lower() not in said, path

    others = [path for path, text in files.items() if path not in changes and len(text) <= MAX_FILE_BYTES]
    kept = [*(path for path in changes if path in files), *sorted(others, key=distance)[:NOISE]]
    return PullRequest(repo, description, {path: files[path] for path in kept}, changes)


def _of_tasks(source: TextSource, options: Options, findings: Findings) -> Iterator[Text]:
    """Tasks in the order of their files; a repository's files are held while its tasks follow one another."""
    specs: dict[str, RepositorySpec] = {}
    missing: dict[str, str] = {}
    held, files = "", {}
    for place, task in read_tasks(source.path, "path", findings):
        try:
            if task.repo not in specs and task.repo not in missing:
                found, lacking = sources.of_tasks([task.repo], [file_of(place)], options.repositories,
                                                  f"{_FIELD}.NAME.options.repositories")
                specs |= found
                missing |= lacking
            if task.repo in missing:
                raise UserError(missing[task.repo])
            if task.repo != held:
                held, files = task.repo, _texts(specs[task.repo])
            changed = starting_changes(task, files)
            now = {path: text for path, text in {**files, **changed}.items() if text is not None}
            if not task.problem_statement.strip():
                raise UserError("its problem_statement is empty")
            request = _made(task.repo, task.problem_statement, now, task.patch)
        except UserError as error:
            findings.row(place, str(error).removeprefix(f"task {task.instance_id}: "))
            continue
        yield request.to_text(task.instance_id, place)


def _texts(spec: RepositorySpec) -> dict[str, str]:
    members = ((name.partition("/"), member.data) for name, member in unpack(spec).items())
    return dict(decoded((path, data) for (kind, _, path), data in members if kind == "repo"))
