"""Issue and pull request texts, from an export or GitHub's API; cleaned of links and of hints at the fix."""

import dataclasses
import json
import os
import pathlib
import re
import time
from collections.abc import Mapping
from typing import Any

import httpx

from qcn_jax import files
from qcn_jax.envs import patches
from qcn_jax.errors import UserError

API = "https://api.github.com"
ATTEMPTS = 4
LONGEST_WAIT = 120.0  # seconds for a rate limit to pass; longer ones end the run, which can be resumed


@dataclasses.dataclass(frozen=True)
class Item:
    """An issue or a pull request."""

    number: int
    title: str
    body: str
    created: str = ""
    is_pull: bool = False


class Tracker:
    """Issues and pull requests by number, and None for those that are not known."""

    def get(self, number: int) -> Item | None:
        """The item of a number."""
        raise NotImplementedError


class Export(Tracker):
    """Items of a JSON or JSON-lines file in the form of GitHub's API.

    Either one list of items, or {"issues": [...], "pulls": [...]}. An item has number, title, body, and optionally
    created_at; pull requests are those under "pulls" and those with the field pull_request.

    Raises:
      UserError: the file cannot be read or an item has no number; names the file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.items: dict[int, Item] = {}
        rows: list[tuple[Any, bool]] = []
        try:
            text = pathlib.Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"--issues={path}: cannot be read: {error.strerror}") from error
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            try:
                value = [json.loads(line) for line in text.split("\n") if line.strip()]
            except (ValueError, RecursionError) as error:
                raise UserError(f"--issues={path}: is neither JSON nor JSON lines") from error
        if isinstance(value, dict) and {"issues", "pulls"} & set(value):
            for key, is_pull in (("issues", False), ("pulls", True)):
                found = value.get(key) or []  # exports of nothing hold null
                if not isinstance(found, list):
                    raise UserError(f"--issues={path}: field {key} must be a list, got {type(found).__name__}")
                rows += [(row, is_pull) for row in found]
        elif isinstance(value, list):
            rows = [(row, False) for row in value]
        else:
            raise UserError(f"--issues={path}: expected a list of items, or an object with issues and pulls")
        for row, is_pull in rows:
            item = _item(row, is_pull, f"--issues={path}")
            self.items[item.number] = item

    def get(self, number: int) -> Item | None:
        return self.items.get(number)


class GitHub(Tracker):
    """Items from GitHub's API, kept in `cache`; the token is read from `variable`.

    Raises:
      UserError: no token, or the API refuses; names owner/name.
    """

    def __init__(self, owner: str, name: str, cache: str | os.PathLike[str], variable: str = "GITHUB_TOKEN",
                 api: str = API):
        self.place, self.cache, self.api = f"{owner}/{name}", pathlib.Path(cache), api
        token = os.environ.get(variable, "")
        if not token:
            raise UserError(f"--issues=github: needs a token in the environment variable {variable}")
        if not owner:
            raise UserError("--issues=github: the clone has no remote origin that names owner and repository")
        self._headers = {"authorization": f"Bearer {token}", "accept": "application/vnd.github+json"}

    def get(self, number: int) -> Item | None:
        path = self.cache / self.place.replace("/", "__") / f"{number}.json"
        if path.exists():
            row = files.read_json(path)
        else:
            row = self._fetch(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(path, row)
        return None if row is None else _item(row, False, self.place)

    def _fetch(self, number: int) -> dict[str, Any] | None:
        url, reason = f"{self.api}/repos/{self.place}/issues/{number}", ""
        for attempt in range(ATTEMPTS):
            try:
                reply = httpx.get(url, headers=self._headers, timeout=30.0, follow_redirects=True)
            except httpx.HTTPError as error:
                reason, pause = str(error), 2.0**attempt
            else:
                if reply.status_code == 200:
                    row = reply.json()
                    return {key: row.get(key) for key in ("number", "title", "body", "created_at", "pull_request")}
                if reply.status_code in (404, 410):
                    return None
                reason = f"answers {reply.status_code}"
                limited = reply.status_code in (403, 429) and reply.headers.get("x-ratelimit-remaining") == "0"
                pause = float(reply.headers.get("retry-after", 2.0**attempt))
                if limited:
                    pause = max(pause, float(reply.headers.get("x-ratelimit-reset", 0)) - time.time())
                if pause > LONGEST_WAIT or (reply.status_code < 500 and not limited and reply.status_code != 429):
                    break
            if attempt < ATTEMPTS - 1:
                time.sleep(pause)
        raise UserError(f"--issues=github: {self.place}#{number}: {reason}")


def _item(row: Any, is_pull: bool, where: str) -> Item:
    if not isinstance(row, Mapping) or not isinstance(row.get("number"), int):
        raise UserError(f"{where}: an item has no number")
    return Item(row["number"], row.get("title") or "", row.get("body") or "", row.get("created_at") or "",
                is_pull or bool(row.get("pull_request")))


# GitHub's keywords that close an issue, followed by #12, owner/name#12 or the address.
_CLOSES = re.compile(r"\b(?:close[sd]?|fix(?:e[sd])?|resolve[sd]?)\b[:\s]*(?:(?:[\w.-]+/[\w.-]+)?#|https?://"
                     r"github\.com/[\w.-]+/[\w.-]+/issues/)(\d+)", re.IGNORECASE)


def closing(text: str) -> tuple[int, ...]:
    """Numbers of the issues that a text says it closes."""
    return tuple(dict.fromkeys(int(number) for number in _CLOSES.findall(text)))


_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
_LINK = re.compile(r"\[([^\]]*)\]\([^)\s]*(?:\s+\"[^\"]*\")?\)")
_URL = re.compile(r"<?\b(?:https?|git|ssh)://[^\s>)\]]+>?|\bwww\.[^\s>)\]]+")
_REFERENCE = re.compile(r"(?<![\w&])(?:[\w.-]+/[\w.-]+)?#\d+\b|\bGH-\d+\b")
_COMMIT = re.compile(r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{7,40}\b")
_DIFF = re.compile(r"```(?:diff|patch)\n.*?(?:```|\Z)", re.DOTALL)
_DIFF_LINE = re.compile(r"^(?:diff --git |index [0-9a-f]+\.\.|--- a/|\+\+\+ b/|@@ -\d)")
_POINTING = frozenset("see also and ref refs reference cf related to in at from duplicate of issue issues here "
                      "link".split())
# Lines that say where the answer is, or what it is.
_HINT = re.compile(
    r"\b(?:(?:possible|proposed|suggested|simple|quick|the|a|my) (?:fix|patch|solution)\b|fix(?:ed)? (?:in|by|with)\b|"
    r"(?:pull request|\bPR\b|merge request)|this (?:patch|commit|change)\b|patch(?:es)? (?:below|attached|is)|"
    r"(?:can|could|should|would) be (?:fixed|solved|resolved) by|(?:close[sd]?|fix(?:e[sd])?|resolve[sd]?):?\s*(?:#|$)|"
    r"signed-off-by|co-authored-by|reviewed-by)", re.IGNORECASE)


def cleaned(text: str, patch: str) -> str:
    """A text without links, references, commits, diffs, lines that hint at the fix, and lines of `patch` itself."""
    text = _DIFF.sub("", _IMAGE.sub("", _COMMENT.sub("", text.replace("\r\n", "\n"))))
    fix = {re.sub(r"\s+", "", line) for file in patches.parse(patch) for hunk in file.hunks
           for sign, line in hunk.lines if sign in "+-"}
    fix = {line for line in fix if len(line) >= 8}
    # References first decide about hints ("fixes #12"), then they go.
    kept = []
    for line in text.split("\n"):
        plain = re.sub(r"\s+", "", line.strip().removeprefix(">>>").lstrip("> +-"))
        if _HINT.search(line) or _DIFF_LINE.match(line) or plain in fix or any(part in plain for part in fix):
            continue
        bare = _COMMIT.sub("", _REFERENCE.sub("", _URL.sub("", _LINK.sub(r"\1", line))))
        if bare != line and set(re.findall(r"[a-z]+", bare.lower())) <= _POINTING:
            continue  # nothing but a pointer to something else
        kept.append(bare.rstrip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
