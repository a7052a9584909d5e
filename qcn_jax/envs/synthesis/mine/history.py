"""A clone's history as changes: merged pull requests and commits of the main line, read with git alone."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

from qcn_jax.envs import names
from qcn_jax.envs.sandbox.repository import MAX_BYTES, MAX_FILES, RepositorySpec, without_leftovers, write_archive
from qcn_jax.envs.synthesis import sources
from qcn_jax.envs.synthesis.mine.gitdir import GitDirectory
from qcn_jax.envs.synthesis.mine.issues import closing
from qcn_jax.errors import UserError

MAX_MESSAGE = 20_000  # characters of a commit's message that are read
_LOG_BYTES = 128_000_000  # of a history's messages
_TREE_BYTES = 1_200 * MAX_FILES  # of a tree's listing
_TREES = 4  # listings that are kept
_MERGE = re.compile(r"Merge pull request #(\d{1,9}) from \S+")
_SQUASHED = re.compile(r"\(#(\d{1,9})\)$")
_ORIGIN = re.compile(r"[:/]([\w.-]+)/([\w.-]+?)(?:\.git)?/?$")
_NAME = re.compile(r"""(?m)^[ \t]*name[ \t]*=[ \t]*["']?([A-Za-z0-9][\w.-]{0,99})""")


@dataclasses.dataclass(frozen=True)
class Change:
    """What one pull request or commit made of the main line; `base` is the state before it."""

    commit: str
    base: str
    date: str  # ISO 8601
    title: str
    body: str
    number: int = 0  # of the pull request; 0: a plain commit
    linked: tuple[int, ...] = ()  # issues that it says it closes


class Clone:
    """A local clone, bare or not, read and never written.

    Raises:
      UserError: `path` is no git repository; names it.
    """

    def __init__(self, path: str | os.PathLike[str], reference: str = "HEAD"):
        self.path, self.reference = pathlib.Path(path), reference
        self._blobs: dict[str, bytes] = {}
        self._trees: dict[str, dict[str, tuple[str, str]]] = {}  # of the last commits: one's base is another's result
        try:
            self._directory = GitDirectory(self.path)
            self.head = self.git("rev-parse", "--verify", "--end-of-options", f"{reference}^{{commit}}").strip()
        except (UserError, OSError) as error:
            raise UserError(f"--repo: {path}: is no git clone with a commit at {reference} ({error})") from error
        found = _ORIGIN.search(self._directory.origin)
        folder = self.path.resolve()
        if folder.name in ("repo", ".git"):
            folder = folder.parent
        parts = [found[1], found[2]] if found else folder.name.removesuffix(".git").split("+")
        self.owner = _plain_name(parts[0]) if len(parts) > 1 else ""
        self.name = _plain_name(parts[-1]) or "repository"

    def git(self, *arguments: str, data: bytes | None = None) -> str:
        """A git command's output."""
        return self._directory.run(*arguments, data=data).decode("utf-8", "replace")

    def changes(self) -> Iterator[Change]:
        """All changes of the main line (first parents), newest first; the first commit is none."""
        log = self._directory.run("log", "--first-parent", "--format=%H%x00%P%x00%cI%x00%B%x01", self.head,
                                  limit=_LOG_BYTES)
        for record in log.split(b"\x01"):
            fields = record.decode("utf-8", "replace").strip("\n").split("\0")
            if len(fields) == 4 and fields[1]:
                yield self._change(fields[0], fields[1].split(), fields[2], fields[3])

    def _change(self, commit: str, parents: Sequence[str], date: str, message: str) -> Change:
        message = message[:MAX_MESSAGE]
        title, _, body = message.strip().partition("\n")
        title = title.rstrip()
        merged, squashed = _MERGE.match(title), _SQUASHED.search(title)
        number = int((merged or squashed or [0, 0])[1])
        if merged:
            title, _, body = body.strip().partition("\n")
        texts = message
        if len(parents) > 1:
            texts += self.git("log", "--format=%B", f"{parents[0]}..{parents[1]}")[:10 * MAX_MESSAGE]
        linked = dict.fromkeys(closing(texts))
        linked.pop(number, None)
        return Change(commit, parents[0], date, _SQUASHED.sub("", title).strip(), body.strip(), number, tuple(linked))

    def touched(self, change: Change) -> dict[str, str]:
        """Paths that a change touches, with A (added), M or D; a moved file is one deleted and one added."""
        for commit in (change.base, change.commit):  # git holds all differences in memory before it prints the first
            self.tree(commit)
        command = ("diff-tree", "-r", "-z", "--no-renames", "--name-status", change.base, change.commit)
        listing = self._directory.run(*command, limit=_TREE_BYTES).decode("utf-8", "replace")
        fields = listing.split("\0")
        return {path: status for status, path in zip(fields[::2], fields[1::2])}

    def tree(self, commit: str) -> dict[str, tuple[str, str]]:
        """{path: (mode, blob)} of a commit's regular files; raises UserError where they are too many."""
        if commit in self._trees:
            return self._trees[commit]
        found: dict[str, tuple[str, str]] = {}
        listing = self._directory.run("ls-tree", "-r", "-z", commit, limit=_TREE_BYTES).decode("utf-8", "replace")
        for entry in listing.split("\0"):
            facts, _, path = entry.partition("\t")
            if facts.startswith("100") and not names.path_fault(path):
                mode, _, blob = facts.split(" ")
                found[path] = (mode, blob)
        found = {path: found[path] for path in without_leftovers(found)}
        if len(self._trees) >= _TREES:
            del self._trees[next(iter(self._trees))]
        self._trees[commit] = found
        return found

    def _check_size(self, blobs: Sequence[str]) -> None:
        """Raises UserError where contents together are larger than any repository may be; unpacks nothing."""
        facts = self.git("cat-file", "--batch-check=%(objectsize)", data="".join(f"{b}\n" for b in blobs).encode())
        sizes = facts.split("\n")[:-1]
        if not all(size.isdigit() for size in sizes):
            raise UserError(f"{self.path}: objects are missing (a partial clone?)")
        if sum(map(int, sizes)) > MAX_BYTES or len(sizes) > MAX_FILES:
            raise UserError(f"{self.path}: more than {MAX_FILES} files or {MAX_BYTES} bytes in one change")

    def read(self, blobs: Sequence[str]) -> dict[str, bytes]:
        """Contents by blob, kept for later calls."""
        missing = [blob for blob in dict.fromkeys(blobs) if blob not in self._blobs]
        if missing:
            self._check_size(missing)
            data = self._directory.run("cat-file", "--batch", data="".join(f"{blob}\n" for blob in missing).encode())
            at = 0
            for blob in missing:
                end = data.index(b"\n", at)
                size = int(data[at:end].split()[2])
                self._blobs[blob] = data[end + 1 : end + 1 + size]
                at = end + 2 + size
        return {blob: self._blobs[blob] for blob in blobs}

    def text_files(self, commit: str) -> dict[str, str]:
        """All regular files of a commit that are text."""
        tree = self.tree(commit)
        data = self.read([blob for _, blob in tree.values()])
        found = {}
        for path, (_, blob) in tree.items():
            try:
                found[path] = data[blob].decode("utf-8")
            except UnicodeDecodeError:
                continue
        return found

    def archive(self, commit: str, folder: str | os.PathLike[str]) -> RepositorySpec:
        """Writes a commit's tree as a source distribution `NAME@COMMIT.tar.gz`, if not there yet, and describes it.

        Nothing is left out (git archive obeys export-ignore), and where the project's name can be read the archive
        holds PKG-INFO, so that importlib.metadata knows the distribution.
        """
        name = f"{self.name}@{commit[:12]}"
        path = pathlib.Path(folder, f"{name}.tar.gz")
        if not path.exists():
            tree = self.tree(commit)
            data = self.read([blob for _, blob in tree.values()])
            members = {entry: (data[blob], int(mode, 8) & 0o777) for entry, (mode, blob) in tree.items()}
            if "PKG-INFO" not in members:
                members |= self._metadata(commit, {entry: content for entry, (content, _) in members.items()})
            write_archive(path, name, members)
        return RepositorySpec(name, str(path.resolve()), sources.sha256(path))

    def _metadata(self, commit: str, contents: Mapping[str, bytes]) -> dict[str, tuple[bytes, int]]:
        for path in ("pyproject.toml", "setup.cfg", "setup.py"):
            found = _NAME.search(contents.get(path, b"").decode("utf-8", "replace"))
            if found:
                text = f"Metadata-Version: 2.1\nName: {found[1]}\nVersion: {self.version(commit) or '0'}\n"
                return {"PKG-INFO": (text.encode(), 0o644)}
        return {}

    def version(self, commit: str) -> str:
        """The last tag before a commit, without letters in front; "" where there is none."""
        try:
            return re.sub(r"^\D+", "", self.git("describe", "--tags", "--abbrev=0", commit).strip())[:100]
        except UserError:
            return ""


def _plain_name(text: str) -> str:
    """What of a name from outside can stand in names of files."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)[:100].lstrip(".-")
