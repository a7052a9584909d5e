"""Unified diffs: made, parsed, applied, reversed, all in memory and all strict about what they touch.

Hunks are parsed by unidiff; applying is `git apply`'s rule (exact context, any offset). A patch that names a path
outside the tree or has more than `MAX_PATCH_BYTES` is refused, and so is one that carries a symlink or a binary file,
unless the caller wants to hear which and have the rest.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping

import unidiff

from qcn_jax.envs import names, patch_headers

MAX_PATCH_BYTES = 1_000_000  # no hand-written or model-written fix comes near; bounds time and memory
# Steps, a line compared each, after which a search ends: some seconds. Searches are quadratic at worst.
MAX_STEPS = 5_000_000
CONTEXT = 3
_CARRIAGE = re.compile(r"^(?:diff --git|\+\+\+) [^\n]*\r$", re.MULTILINE)
CUT_BLANKS = 3  # blank lines that GNU patch takes to have been cut off from the end of a patch


class PatchError(ValueError):
    """The patch is malformed, not allowed, or does not apply; `str(error)` is one line."""


@dataclasses.dataclass(frozen=True)
class Hunk:
    """Consecutive lines of a patch: (" ", "-" or "+", text with its newline, if it has one)."""

    old_start: int
    new_start: int
    lines: tuple[tuple[str, str], ...]

    def side(self, sign: str) -> list[str]:
        """The text before (sign "-") or after (sign "+") the hunk."""
        return [text for op, text in self.lines if op in (" ", sign)]


@dataclasses.dataclass(frozen=True)
class FilePatch:
    """All hunks of one file; `old` is None for a new file and `new` is None for a deleted one.

    Where they are different files the old one is moved, or `copied`, which leaves it as it is.
    """

    old: str | None
    new: str | None
    hunks: tuple[Hunk, ...]
    copied: bool = False

    @property
    def path(self) -> str:
        """The path after the patch, or before it where the file is deleted."""
        return self.new if self.new is not None else self.old or ""


def make_diff(before: Mapping[str, str | None], after: Mapping[str, str | None]) -> str:
    """The unified diff (git style) that turns `before` into `after`; None or absent means no file."""
    patches = []
    for path in sorted({*before, *after}):
        old, new = before.get(path), after.get(path)
        if old != new:
            hunks = _hunks(_lines(old or ""), _lines(new or ""))
            patches.append(FilePatch(None if old is None else path, None if new is None else path, hunks))
    return render(patches)


def check_size(diff: str, limit: int = MAX_PATCH_BYTES) -> None:
    """Raises PatchError where `diff` has more than `limit` bytes, or is no text and so has no size."""
    try:  # bytes of files that are no UTF-8 may stand in it, as surrogateescape has them
        size = len(diff.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError as error:
        raise PatchError(f"patch is no text: it {names.text_fault(diff[error.start])}") from error
    if size > limit:
        raise PatchError(f"patch is larger than {limit} bytes")


def parse(diff: str, unfit: dict[str, str] | None = None) -> list[FilePatch]:
    """Parses a unified diff.

    Args:
      diff: the last line may lack its end, and blank lines at the end may have been cut off.
      unfit: takes paths that are binary, symlinks or submodules, with that reason; the other files are returned.

    Raises:
      PatchError: malformed, too large, or a path outside the tree; without `unfit` also a file that is no text.
    """
    check_size(diff)
    diff += "" if diff.endswith("\n") else "\n"
    if _CARRIAGE.search(diff):  # lines of headers end so only where all of the patch came to
        diff = diff.replace("\r\n", "\n")
    found: list[FilePatch] = []
    try:
        for header, text in patch_headers.sections(diff):
            if header is None:
                found += filter(None, [_plain_patch(file, unfit) for file in _unidiff(text)])
            elif not _left_out(_path(header.new or header.old), header.unfit, unfit):
                found += _git_patches(header, text)
    except (unidiff.errors.UnidiffParseError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, PatchError):
            raise
        raise PatchError(f"patch is malformed: {str(error).splitlines()[0] if str(error) else error!r}") from error
    if diff.strip() and not found and not unfit:
        raise PatchError("patch is malformed: no file header found")
    return found


def render(patches: Iterable[FilePatch]) -> str:
    """The text of parsed patches, in the form that `git diff` prints."""
    out = []
    for patch in patches:
        old, new = patch.old or patch.path, patch.path
        out.append(f"diff --git a/{old} b/{new}\n")
        if patch.old is None:
            out.append("new file mode 100644\n")
        elif patch.new is None:
            out.append("deleted file mode 100644\n")
        elif patch.old != patch.new:
            way = "copy" if patch.copied else "rename"
            out.append(f"{way} from {patch.old}\n{way} to {patch.new}\n")
        if patch.hunks:
            out.append("--- " + (f"a/{patch.old}" if patch.old is not None else "/dev/null") + "\n")
            out.append("+++ " + (f"b/{patch.new}" if patch.new is not None else "/dev/null") + "\n")
        for hunk in patch.hunks:
            out.append(f"@@ -{_span(hunk.old_start, len(hunk.side('-')))} "
                       f"+{_span(hunk.new_start, len(hunk.side('+')))} @@\n")
            for op, text in hunk.lines:
                out.append(op + text + ("" if text.endswith("\n") else "\n\\ No newline at end of file\n"))
    return "".join(out)


def reverse(diff: str) -> str:
    """The diff that undoes `diff`; raises PatchError, also where it copies, which says not what the copy holds."""
    swap = {" ": " ", "-": "+", "+": "-"}
    reversed_patches = []
    for patch in parse(diff):
        if patch.copied:
            raise PatchError(f"{patch.path}: a copy cannot be reversed")
        hunks = []
        for hunk in patch.hunks:
            lines: list[tuple[str, str]] = []
            added: list[tuple[str, str]] = []  # kept behind the removals of the same run of changes
            for op, text in hunk.lines:
                if op == " ":
                    lines += added
                    added = []
                (added if swap[op] == "+" else lines).append((swap[op], text))
            hunks.append(Hunk(hunk.new_start, hunk.old_start, tuple(lines + added)))
        reversed_patches.append(FilePatch(patch.new, patch.old, tuple(hunks)))
    return render(reversed_patches)


def apply_changes(files: Mapping[str, str], diff: str | Iterable[FilePatch]) -> dict[str, str | None]:
    """What `diff` makes of `files`: {path: new text, or None where it is deleted}, touched paths only.

    Raises:
      PatchError: it does not apply; the line names the file and the hunk.
    """
    changes: dict[str, str | None] = {}
    gone: set[str] = set()  # where the files were that are moved

    def current(path: str) -> str | None:
        return changes[path] if path in changes else files.get(path)

    parsed, steps = parse(diff) if isinstance(diff, str) else list(diff), _Steps()
    leaving = {patch.old for patch in parsed if patch.old != patch.new and not patch.copied}
    for patch in parsed:
        moves = patch.old is not None and patch.new is not None and patch.old != patch.new
        if patch.new is not None and patch.new != patch.old and current(patch.new) is not None and (
                patch.new in changes or patch.new not in leaving):
            raise PatchError(f"{patch.path}: already exists")
        if patch.old is None:
            text = ""
        else:  # what is moved or copied is the file as it was before the whole patch, as git has it
            text = files.get(patch.old) if moves else current(patch.old)
            if text is None:
                raise PatchError(f"{patch.old}: no such file")
        text = _apply_hunks(text, patch, steps)
        if patch.new is None and text:
            raise PatchError(f"{patch.path}: the patch deletes the file but not all of its lines")
        if moves and not patch.copied:
            gone.add(patch.old)
        changes[patch.path] = text if patch.new is not None else None
    changes |= {path: None for path in gone - changes.keys()}
    _check_folders(files, changes)
    return changes


def _check_folders(files: Mapping[str, str], changes: Mapping[str, str | None]) -> None:
    """Raises PatchError where `changes` use a file as a folder, or put a file where a folder is."""
    new = {path for path, text in changes.items() if text is not None and path not in files}
    if not new:
        return
    there = {**dict.fromkeys(files, True), **{path: text is not None for path, text in changes.items()}}
    folders = {folder for path, present in there.items() if present for folder in _folders(path)}
    for path in sorted(new):
        above = next((folder for folder in _folders(path) if there.get(folder)), None)
        if above is not None:
            raise PatchError(f"{path}: {above} is a file and no folder")
        if path in folders:
            raise PatchError(f"{path}: is a folder")


def _folders(path: str) -> list[str]:
    """The folders above `path`, without the root."""
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts))]


class _Steps:
    """What a search may still cost."""

    def __init__(self, left: int = MAX_STEPS):
        self.left = left

    def take(self, count: int) -> bool:
        """Counts steps; whether there are still some."""
        self.left -= count
        return self.left >= 0


def apply_diff(files: Mapping[str, str], diff: str | Iterable[FilePatch]) -> dict[str, str]:
    """`files` with `diff` applied, as a new mapping without the deleted files; raises PatchError."""
    merged = {**files, **apply_changes(files, diff)}
    return {path: text for path, text in merged.items() if text is not None}


def touched(diff: str) -> list[str]:
    """All paths that `diff` changes, sorted."""
    return sorted({path for patch in parse(diff) for path in (None if patch.copied else patch.old, patch.new)
                   if path is not None})


def _lines(text: str) -> list[str]:
    """Lines with their newline; only "\\n" ends a line (str.splitlines also splits at form feeds)."""
    lines = text.split("\n")
    return [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


class _Matcher(difflib.SequenceMatcher):
    """difflib's, which after MAX_STEPS calls the rest different: such a diff is right, only longer than it need be."""

    def __init__(self, old: list[str], new: list[str]):
        super().__init__(None, old, new, autojunk=False)
        self._costs, self._steps = [0], _Steps()  # the inner loop's steps for the lines of `old` up to each
        for line in old:
            self._costs.append(self._costs[-1] + 1 + len(self.b2j.get(line, ())))

    def find_longest_match(self, alo: int = 0, ahi: int | None = None, blo: int = 0,
                           bhi: int | None = None) -> difflib.Match:
        end = len(self.a) if ahi is None else ahi
        if not self._steps.take(self._costs[end] - self._costs[alo]):
            return difflib.Match(alo, blo, 0)
        return super().find_longest_match(alo, end, blo, bhi)


def _span(start: int, length: int) -> str:
    return str(start) if length == 1 else f"{start},{length}"


def _hunks(old: list[str], new: list[str]) -> tuple[Hunk, ...]:
    # difflib is quadratic at worst: the common head and tail, nearly everything, are cut off first.
    head = 0
    while head < min(len(old), len(new)) and old[head] == new[head]:
        head += 1
    tail = 0
    while tail < min(len(old), len(new)) - head and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    middle = _Matcher(old[head:len(old) - tail], new[head:len(new) - tail])
    whole = difflib.SequenceMatcher()
    whole.opcodes = [  # what get_opcodes would find, put together from the three parts
        *([("equal", 0, head, 0, head)] if head else []),
        *((tag, i + head, j + head, k + head, m + head) for tag, i, j, k, m in middle.get_opcodes()),
        *([("equal", len(old) - tail, len(old), len(new) - tail, len(new))] if tail else [])]
    hunks = []
    for group in whole.get_grouped_opcodes(CONTEXT):
        lines: list[tuple[str, str]] = []
        for tag, i, j, k, m in group:
            if tag == "equal":
                lines += [(" ", line) for line in old[i:j]]
            else:
                lines += [("-", line) for line in old[i:j]] + [("+", line) for line in new[k:m]]
        old_length, new_length = group[-1][2] - group[0][1], group[-1][4] - group[0][3]
        hunks.append(Hunk(group[0][1] + (1 if old_length else 0),
                          group[0][3] + (1 if new_length else 0), tuple(lines)))
    return tuple(hunks)


def _path(name: str) -> str:
    if fault := names.path_fault(name):
        raise PatchError(f"path {names.shown(name)} {fault}")
    return name


def _unidiff(text: str) -> list[unidiff.PatchedFile]:
    for cut in range(CUT_BLANKS + 1):
        try:
            return list(unidiff.PatchSet.from_string(text + cut * "\n"))
        except unidiff.errors.UnidiffParseError:
            if cut == CUT_BLANKS:
                raise
    raise AssertionError


def _left_out(path: str, reason: str, unfit: dict[str, str] | None) -> bool:
    """Whether a file is no text, which `unfit` is told."""
    if reason and unfit is None:
        raise PatchError(f"{path}: {reason}, which is not allowed")
    if reason and unfit is not None:
        unfit[path] = reason
    return bool(reason)


def _git_patches(header: patch_headers.Header, text: str) -> list[FilePatch]:
    """The patch of a file with git's header, and of those that `diff` wrote behind it."""
    old, new = (name if name is None else _path(name) for name in (header.old, header.new))
    if old is None and new is None:
        raise PatchError("a file patch names no file")
    if not text:
        return [FilePatch(old, new, (), header.copied)]
    first, *others = _unidiff(f"--- a/file\n+++ b/file\n{text}")
    found = [FilePatch(old, new, _parsed_hunks(first), header.copied)]
    return found + [patch for file in others if (patch := _plain_patch(file, None)) is not None]


def _plain_patch(file: unidiff.PatchedFile, unfit: dict[str, str] | None) -> FilePatch | None:
    """The patch of a file without git's header; None where it is left out."""
    given = (patch_headers.unquoted(name) for name in (file.source_file, file.target_file))
    old, new = patch_headers.bare(*(None if name == "/dev/null" else name for name in given))
    if old is None and new is None:
        raise PatchError("a file patch names no file")
    if old is not None and new is not None and old != new:  # `diff` knows no renames; git has the same rule
        old = new = old if new.startswith(old) else new
    path = _path(new if new is not None else old or "")
    if _left_out(path, "is binary" if file.is_binary_file else "", unfit):
        return None
    return FilePatch(old, new, _parsed_hunks(file))


def _parsed_hunks(file: unidiff.PatchedFile) -> tuple[Hunk, ...]:
    hunks = []
    for hunk in file:
        lines: list[tuple[str, str]] = []
        for line in hunk:
            if line.line_type == "\\":
                op, text = lines[-1]
                lines[-1] = (op, text.removesuffix("\n"))
            else:
                lines.append((line.line_type or " ", line.value))
        hunks.append(Hunk(hunk.source_start, hunk.target_start, tuple(lines)))
    return tuple(hunks)


def _apply_hunks(text: str, patch: FilePatch, steps: _Steps) -> str:
    lines, result, position = _lines(text), [], 0
    for number, hunk in enumerate(patch.hunks, 1):
        wanted = hunk.side("-")
        stated = hunk.old_start - 1 if wanted else hunk.old_start
        at = _find(lines, wanted, stated, position, steps)
        if at is None:
            raise PatchError(f"{patch.path}: hunk {number} does not apply")
        result += lines[position:at] + hunk.side("+")
        position = at + len(wanted)
    result += lines[position:]
    return "".join(result)


def _find(lines: list[str], wanted: list[str], stated: int, lowest: int, steps: _Steps) -> int | None:
    """The place nearest to `stated`, not before `lowest`, at which `wanted` stands.

    Raises:
      PatchError: the search takes too long.
    """
    last = len(lines) - len(wanted)
    if not wanted:  # nothing to look for: only the stated place will do
        return stated if lowest <= stated <= last else None
    stated = max(lowest, min(stated, last))  # the nearest places are the same
    for distance in range(max(abs(lowest - stated), abs(last - stated)) + 1):
        for at in (stated - distance, stated + distance)[:1 if not distance else 2]:
            if not lowest <= at <= last:
                continue
            alike = lines[at] == wanted[0] and lines[at + len(wanted) - 1] == wanted[-1]
            if not steps.take(len(wanted) if alike else 1):
                raise PatchError("its hunks take too long to place")
            if alike and lines[at:at + len(wanted)] == wanted:
                return at
    return None
