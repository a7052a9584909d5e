"""Pull requests as tasks: what is asked for, the files that are there, and the edits that do it.

  <|repo_name|>NAME\nDESCRIPTION\n<|file_sep|>PATH\nTEXT<|file_sep|>PATH\nTEXT ... <|fim_middle|>EDITS<|endoftext|>

Files are those that the edits change, as they were before, and some that they do not, in random order: where to look is
part of the task. Of files too long for a row the surroundings of the edits are shown. EDITS are search-and-replace
blocks, each with the shortest SEARCH that begins and ends at lines and occurs once, or a git diff:

  PATH\n<<<<<<< SEARCH\n...=======\n...>>>>>>> REPLACE\n

Loss weights count description and edits; files have their own in the forms that read them as such.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from qcn_jax.chat.tokenizer import END_OF_TEXT, Tokenizer
from qcn_jax.envs import patches
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data.documents import Request
from qcn_jax.pipeline.data.documents.repository import FILE_SEP, REPO_NAME
from qcn_jax.pipeline.data.loader import TokenStore
from qcn_jax.pipeline.data.texts import Text

EDITS = "<|fim_middle|>"  # before the edits: what fits there is wanted, as in the other forms with this token
SEARCH, DIVIDER, REPLACE = "<<<<<<< SEARCH\n", "=======\n", ">>>>>>> REPLACE\n"
_AROUND = 20  # lines before and behind an edit that an excerpt shows
_KIND = "pull request"


@dataclasses.dataclass(frozen=True)
class PullRequest:
    """A change that somebody asked for.

    Attributes:
      repo: its repository's name.
      description: the issue, or title and body.
      files: texts before the change by path: of what it changes, and others.
      changes: texts behind it by path, None for a file that it removes.
    """

    repo: str
    description: str
    files: Mapping[str, str]
    changes: Mapping[str, str | None]

    @property
    def diff(self) -> str:
        """The change as a git diff."""
        return patches.make_diff({path: self.files.get(path) for path in self.changes}, self.changes)

    def to_text(self, path: str = "", place: str = "") -> Text:
        """All of it as one text, whose lines filters can read; `from_text` reads it back."""
        parts = [["description", "", self.description], *(["file", name, text] for name, text in self.files.items()),
                 *(["change", name, text] for name, text in self.changes.items())]
        head = json.dumps([_KIND, *([kind, name, None if text is None else len(text)] for kind, name, text in parts)])
        return Text("\n".join([head, *(text or "" for _, _, text in parts)]), path, self.repo, place=place)

    @classmethod
    def from_text(cls, text: Text) -> "PullRequest":
        """Reads `to_text`; raises UserError for any other text."""
        head, _, body = text.text.partition("\n")
        try:
            kind, *parts = json.loads(head)
        except (ValueError, TypeError):
            kind, parts = None, []
        if kind != _KIND:
            raise UserError("form pull_request: the source's texts are no pull requests; they come from "
                            "kind=pull_requests")
        found: dict[str, dict[str, str | None]] = {"description": {}, "file": {}, "change": {}}
        for part, name, length in parts:
            found[part][name] = None if length is None else body[:length]
            body = body[(length or 0) + 1:]
        return cls(text.repo, found["description"][""], found["file"], found["change"])


def search_and_replace(request: PullRequest) -> str | None:
    """The change as search-and-replace blocks, in order; None where it cannot be said so.

    That is a file removed, a last line without an end, or lines that read like the blocks' own.
    """
    blocks = []
    for path, after in request.changes.items():
        before = request.files.get(path)
        if after is None or any(mark in f"{before or ''}{after}" for mark in (SEARCH, DIVIDER, REPLACE)):
            return None
        if before is None:
            blocks.append((path, "", after))
            continue
        current = before
        for patch in patches.parse(patches.make_diff({path: before}, {path: after})):
            for hunk in patch.hunks:
                search, replace = _block(current, hunk)
                if not search or current.count(search) != 1:
                    return None
                blocks.append((path, search, replace))
                current = current.replace(search, replace)
        if current != after:
            return None
    if any(text and not text.endswith("\n") for _, *texts in blocks for text in texts):
        return None
    return "".join(f"{path}\n{SEARCH}{search}{DIVIDER}{replace}{REPLACE}" for path, search, replace in blocks)


def _lines(text: str) -> list[str]:
    """Lines with their ends, of which \\n is the only one, as in a diff."""
    return [line for line in re.split(r"(?<=\n)", text) if line]


def _block(current: str, hunk: patches.Hunk) -> tuple[str, str]:
    """A hunk of a text as (search, replace): its changed lines, with as many around them as make them unique.

    Places are those behind the change, as hunks before it are done already.
    """
    lines = _lines(current)
    old, new = hunk.side("-"), hunk.side("+")
    first = max(hunk.new_start - 1, 0) if new else hunk.new_start
    head = next((n for n, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
    tail = next((n for n, (a, b) in enumerate(zip(old[head:][::-1], new[head:][::-1])) if a != b),
                min(len(old), len(new)) - head)
    start, stop = first + head, first + len(old) - tail
    middle = "".join(new[head:len(new) - tail])
    while True:
        search = "".join(lines[start:stop])
        if search.strip() and current.count(search) == 1 or (start == 0 and stop >= len(lines)):
            begin, end = "".join(lines[start:first + head]), "".join(lines[first + len(old) - tail:stop])
            return search, begin + middle + end
        start, stop = max(start - 1, 0), min(stop + 1, len(lines))


def documents(request: Request) -> TokenStore:
    """The form `pull_request` of a source: half of the edits search and replace, half diffs."""
    return _documents(request, lambda number: number % 2 == 0)


def edits(request: Request) -> TokenStore:
    """The form `pull_request_edits`: search and replace wherever that can say it."""
    return _documents(request, lambda number: True)


def diffs(request: Request) -> TokenStore:
    """The form `pull_request_diff`."""
    return _documents(request, lambda number: False)


def _documents(request: Request, replacing: Callable[[int], bool]) -> TokenStore:
    if TokenStore.exists(request.folder):
        return TokenStore(request.folder)
    made = {"tokens": 0, "too long": 0, "as diffs": 0}

    def enough() -> Iterator[dict[str, np.ndarray]]:
        for number, text in enumerate(request.texts):
            if made["tokens"] >= request.tokens:
                break
            asked = PullRequest.from_text(text)
            blocks = search_and_replace(asked) if replacing(number) else None
            made["as diffs"] += replacing(number) and blocks is None
            rng = np.random.default_rng([request.context.config.seed, number])
            change = asked.diff if blocks is None else blocks
            document = _document(asked, change, request.tokenizer, request.length, rng)
            if document is None:
                made["too long"] += 1
            else:
                made["tokens"] += len(document["tokens"])
                yield document

    store = TokenStore.write(request.folder, enough())
    request.context.log(f"{request.name}: {len(store)} pull requests, {store.tokens:,} tokens, {made['too long']} "
                        f"longer than a row left out, {made['as diffs']} as diffs that no search and replace can say")
    return store


def _document(asked: PullRequest, change: str, tokenizer: Tokenizer, length: int, rng: np.random.Generator
              ) -> dict[str, np.ndarray] | None:
    """A document of at most `length` tokens: whole files, or else excerpts; None where those do not fit either."""
    special, encode = tokenizer.id, tokenizer.encode_ordinary
    head = [special(REPO_NAME), *encode(f"{asked.repo}\n{asked.description.strip()}\n")]
    end = [special(EDITS), *encode(change), special(END_OF_TEXT)]
    changed = [path for path in asked.changes if path in asked.files]
    shown = lambda path, text: [special(FILE_SEP), *encode(f"{path}\n{text}")]
    for show in (lambda path: asked.files[path], lambda path: _excerpt(asked, path)):
        parts = [shown(path, show(path)) for path in changed]
        room = length - len(head) - len(end) - sum(map(len, parts))
        if room >= 0:
            break
    else:
        return None
    others = [path for path in asked.files if path not in asked.changes]
    for index in rng.permutation(len(others)):
        part = shown(others[index], asked.files[others[index]])
        if len(part) <= room:
            parts.append(part)
            room -= len(part)
    context = [token for index in rng.permutation(len(parts)) for token in parts[index]]
    told = [1.0] * len(head) + [0.0] * len(context) + [1.0] * len(end)
    tokens = np.asarray([*head, *context, *end], np.int32)
    return {"tokens": tokens, "weights": np.asarray([*told[1:], 0.0], np.float32)}


def _excerpt(asked: PullRequest, path: str) -> str:
    """The lines around the edits of a file, with a line where others are left out."""
    lines = _lines(asked.files[path])
    keep: set[int] = set()
    for patch in patches.parse(patches.make_diff({path: asked.files[path]}, {path: asked.changes[path]})):
        for hunk in patch.hunks:
            first = hunk.old_start - 1
            keep |= set(range(max(first - _AROUND, 0), min(first + len(hunk.side("-")) + _AROUND, len(lines))))
    shown, last = [], -1
    for number in sorted(keep):
        shown += ["...\n"] * (number > last + 1) + [lines[number]]
        last = number
    return "".join([*shown, *["...\n"] * (last + 1 < len(lines))])
