"""Headers of file patches, as `git diff` writes them in each of its settings, `diff -u` and people.

Names are quoted where they are not ASCII, prefixed with a/ and b/, with other letters (diff.mnemonicPrefix) or with
nothing, and of renames and copies given apart; `git apply -p1` is the rule. Lines of hunks are not looked into: they
begin with a blank, "+", "-" or "\\", and so none of them begins a file's section.
"""

import dataclasses
import re
from collections.abc import Iterator

_BINARY = re.compile(r"GIT binary patch$|Binary files .* differ$", re.MULTILINE)
_ESCAPE = re.compile(rb"\\([0-7]{3}|.)", re.DOTALL)
_ESCAPED = {b"a": b"\a", b"b": b"\b", b"t": b"\t", b"n": b"\n", b"v": b"\v", b"f": b"\f", b"r": b"\r"}
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_INDEX = re.compile(r"^index [0-9a-f.]+ (\d+)$", re.MULTILINE)
_IS_BINARY = "is binary"
_REGULAR = "100"  # first digits of the modes of files that are neither links nor submodules


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file's section says before its hunks; `old` is None for a new file and `new` for a deleted one.

    `unfit` says why it is no change to the text of a file, "" where it is.
    """

    old: str | None
    new: str | None
    copied: bool = False
    unfit: str = ""


def sections(diff: str) -> Iterator[tuple[Header | None, str]]:
    """Cuts a diff before each file's header: (header, hunks). None: what `diff` wrote, with its headers in the text.

    Raises:
      ValueError: a header names no file.
    """
    for section in re.split(r"(?m)^(?=diff --git )", diff):
        if not section.startswith("diff --git "):
            if section.strip():
                yield None, section
            continue
        start = re.search(r"(?m)^@@ ", section)
        end = start.start() if start else len(section)
        header = _git_header(section[:end])
        if start and header.unfit == _IS_BINARY:
            raise ValueError(f"{header.new or header.old} is binary and has hunks")
        yield header, section[end:]


def _git_header(text: str) -> Header:
    first, *lines = text.split("\n")
    said: dict[str, str] = {}
    for line in lines:
        for key in ("--- ", "+++ ", "rename from ", "rename to ", "copy from ", "copy to ", "new file mode ",
                    "deleted file mode ", "old mode ", "new mode "):  # fmt: skip
            if line.startswith(key):
                said.setdefault(key.strip(), line[len(key):].removesuffix("\r"))
    pair = _pair(first.removeprefix("diff --git ").removesuffix("\r"))
    old, new = said.get("rename from", said.get("copy from")), said.get("rename to", said.get("copy to"))
    if old is not None and new is not None:
        old, new = unquoted(old), unquoted(new)
    elif "---" in said and "+++" in said:
        old, new = _written(said["---"]), _written(said["+++"])
        old, new = pair if pair is not None and None in (old, new) else bare(old, new)
        if old is not None and new is not None and old != new:
            raise ValueError(f"its header names two files, {old[:60]!r} and {new[:60]!r}")
    elif pair is not None:
        old, new = pair
    else:
        raise ValueError(f"no file is named by {first[:80]!r}")
    modes = [said[key] for key in ("new file mode", "deleted file mode", "old mode", "new mode") if key in said]
    modes += _INDEX.findall(text)
    unfit = ("is no regular file" if any(not mode.startswith(_REGULAR) for mode in modes)
             else _IS_BINARY if _BINARY.search(text) else "")
    return Header(None if "new file mode" in said or said.get("---") == "/dev/null" else old,
                  None if "deleted file mode" in said or said.get("+++") == "/dev/null" else new,
                  "copy from" in said, unfit)


def _written(name: str) -> str | None:
    """The name of a line that begins with --- or +++, behind which a time may stand."""
    name = unquoted(name) if name.startswith('"') else name.split("\t")[0]
    return None if name == "/dev/null" else name


def _pair(words: str) -> tuple[str, str] | None:
    """Both names of a line `diff --git`, without their prefixes, where they are the same file's; None where not."""
    quoted = re.fullmatch(rf"({_QUOTED}|\S+) ({_QUOTED}|\S+)", words)
    if quoted and '"' in words:
        ways = [(unquoted(quoted[1]), unquoted(quoted[2]))]
    else:  # blanks are not quoted: the names are as long as each other, or nearly
        ways = [(words[:at], words[at + 1:]) for at, char in enumerate(words) if char == " "]
    for old, new in ways:
        pair = bare(old, new)
        if pair[0] == pair[1]:
            return pair
    return None


def bare(old: str | None, new: str | None) -> tuple[str | None, str | None]:
    """Names without their prefixes: a/ and b/, or whatever other first parts two names have that else are the same."""
    plain = tuple(name[2:] if name is not None and name[:2] in ("a/", "b/") else name for name in (old, new))
    if old is not None and new is not None and plain[0] != plain[1]:
        rests = tuple(name.partition("/")[2] for name in (old, new))
        if rests[0] == rests[1] != "":
            return rests
    return plain


def unquoted(name: str) -> str:
    """A name as git quotes it in C's way, where it does; bytes that are no UTF-8 become surrogates."""
    if not re.fullmatch(_QUOTED, name.rstrip("\t"), re.DOTALL):
        return name

    def plain(match: re.Match[bytes]) -> bytes:
        code = match[1]
        return bytes([int(code, 8) & 255]) if len(code) == 3 else _ESCAPED.get(code, code)

    return _ESCAPE.sub(plain, name.rstrip("\t")[1:-1].encode("utf-8", "surrogateescape")).decode(
        "utf-8", "surrogateescape")
