"""Names that rows, patches and clones bring: which of them may become a path, the name of a file, or an image.

Whoever wrote a row chose its names, so none is used before it was looked at here. Each function returns what is wrong
as words for a message, "" where nothing is.
"""

import posixpath
import re

LONGEST_PART = 255  # bytes of one name, as file systems have it
LONGEST_PATH = 1024  # bytes below the repository; the kernel's 4096 hold the folders above as well
LONGEST_ID = 200  # bytes: endings and temporary names still fit behind it
_RESERVED = (".json", ".jsonl", ".xml", ".html")  # what evaluations write beside the folders of their instances
# Docker's grammar of references, and an image's id; "//" and ".." would lead to other parts of the engine's interface.
_IMAGE = re.compile(r"(?:sha256:[0-9a-f]{64}|"
                    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]|\.(?!\.)){0,252}(?::\d{1,5})?/)?[a-z0-9]+(?:[._-]{1,2}[a-z0-9]+|/[a-z0-9]+)*"
                    r"(?::\w[\w.-]{0,127})?(?:@sha256:[0-9a-f]{64})?)", re.ASCII)


def text_fault(text: str) -> str:
    """What keeps `text` from being written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"holds {text[error.start]!a}, which is half of a character"
    return ""


def path_fault(path: str) -> str:
    """What keeps `path` from naming a file below a repository's root, with "/" between folders."""
    if not path or path.startswith("/") or posixpath.normpath(path) != path or path.split("/")[0] in (".", ".."):
        return "is not inside the repository"
    if any(ord(char) < 32 or ord(char) == 127 for char in path):
        return "holds a control character"
    if fault := text_fault(path):
        return fault
    if len(path.encode()) > LONGEST_PATH or any(len(part.encode()) > LONGEST_PART for part in path.split("/")):
        return f"is longer than {LONGEST_PATH} bytes, or one of its parts than {LONGEST_PART}"
    return ""


def id_fault(name: str) -> str:
    """What keeps `name` from being an instance's id, after which a folder is named."""
    if fault := text_fault(name):
        return fault
    if not name or len(name.encode()) > LONGEST_ID:
        return f"must have 1 to {LONGEST_ID} bytes"
    if name[0] in ".-" or any(char in "/\\" or not char.isprintable() or char.isspace() for char in name):
        return "must be printable, without blanks, / and \\, and not begin with . or -"
    return f"must not end with {' or '.join(_RESERVED)}" if name.lower().endswith(_RESERVED) else ""


def file_stem(name: str) -> str:
    """`name`, of a model say, as the beginning of a file's name: what could lead elsewhere becomes "_"."""
    return re.sub(r"[^\w.@+=,-]", "_", name, flags=re.ASCII).lstrip(".-")[:LONGEST_ID - 50] or "_"


def image_fault(name: str) -> str:
    """What keeps `name` from being a reference to a Docker image."""
    return "" if len(name) <= LONGEST_PART and _IMAGE.fullmatch(name) else "is no name of a Docker image"


def shown(name: str) -> str:
    """A name as messages print it: quoted, ASCII, and not endless."""
    return ascii(name if len(name) <= 60 else name[:60] + "...")
