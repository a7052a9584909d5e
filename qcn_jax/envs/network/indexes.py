"""The package indexes that agents reach, as one tree of plain HTTP paths; the requests behind it go out by HTTPS.

  /pypi/simple/PROJECT/          PEP 691's JSON; its files are /pypi/files/PROJECT/FILENAME
  /npm/PACKAGE                   the registry's document; its archives are /npm/PACKAGE/-/FILENAME
  /go/MODULE/@v/...              Go's module proxy

What was published at and after a date is left out of listings of the package under test, and a file is served only if
the listing names it. Clients are pointed here by their own settings, so that nobody's TLS is broken up. An index that
does not tell when a file was uploaded (PEP 700) gives no file of that package.
"""

import dataclasses
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qcn_jax.envs.network.policy import Refused, Withheld, canonical, check_file
from qcn_jax.memo import Once

if TYPE_CHECKING:
    import httpx

PYPI, NPM, GO = "https://pypi.org/simple", "https://registry.npmjs.org", "https://proxy.golang.org"
_SIMPLE = "application/vnd.pypi.simple.v1+json"
_ABBREVIATED = "application/vnd.npm.install-v1+json"
_LISTINGS = 64  # kept; some take megabytes
_GO_VERSION = re.compile(r"v\d+\.\d+\.\d+[\w.+-]*")  # a released or pseudo-version, and no branch or commit
MAX_LISTING, KEPT = 32 << 20, 4 << 20  # bytes of a listing, and of one that is kept
READERS = 4  # listings that are taken apart side by side; that takes several times their size
# The proxy serves any repository of a code host as a module, Python's too; only what is one says its Go version.
_GO_MODULE = re.compile(r"(?m)^\s*go\s+\d")
MAX_VERSIONS = 300  # of a Go module whose dates are asked for, the newest


class Unanswered(Exception):
    """The index gave no answer that can be handed on; `status` is what the client gets."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Document:
    """A reply that was made here."""

    body: bytes
    kind: str = "application/json"


@dataclasses.dataclass(frozen=True)
class File:
    """A reply that is passed on from `url`; `index` named it, and redirections are followed as far as that may lead.

    Without an index they are the client's to follow, and to be judged again.
    """

    url: str
    index: str = ""


class Indexes:
    """Answers requests for packages.

    Args:
      client: makes the requests.
      environment: as in os.environ; PIP_INDEX_URL, npm_config_registry and GOPROXY name other indexes than the public.
    """

    def __init__(self, client: "httpx.Client", environment: Mapping[str, str] = os.environ):
        self._client, self._turns = client, threading.BoundedSemaphore(READERS)
        self._known = Once(lambda found: len(found[1]) <= KEPT, limit=_LISTINGS)
        go = re.split(r"[,|]", environment.get("GOPROXY", ""))[0]
        self.pypi = environment.get("PIP_INDEX_URL", PYPI).rstrip("/")
        self.npm = environment.get("npm_config_registry", NPM).rstrip("/")
        self.go = go.rstrip("/") if go.startswith("http") else GO

    def answer(self, path: str, accept: str, about: Withheld, here: str) -> Document | File:
        """The reply to a request.

        Args:
          path: below the proxy.
          accept: the request's header.
          about: the package under test.
          here: the proxy's own address, as the client writes it.

        Raises:
          Refused: the path is none of an index, or withheld.
          Unanswered: the index does not have it, or does not answer.
        """
        parts = [urllib.parse.unquote(part) for part in path.split("?")[0].strip("/").split("/")]
        if any(part in ("", ".", "..") or "/" in part and not part.startswith("@") for part in parts):
            raise Refused("path", "refused: no path of a package index")
        with self._turns:
            try:
                return self._answer(parts, accept, about, here)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise Unanswered(502, "the package index answers what cannot be read") from error

    def _answer(self, parts: list[str], accept: str, about: Withheld, here: str) -> Document | File:
        match parts:
            case ["pypi", "simple", project]:
                return self._project(project, about)
            case ["pypi", "files", project, name]:
                return self._distribution(project, name, about)
            case ["npm", *package, "-", name] if package:
                return self._archive("/".join(package), name, about)
            case ["npm", *package] if package and package[0] != "-":
                return self._package("/".join(package), accept, about, here)
            case ["go", *module, "@v", name] if module:
                return self._module("/".join(module), name, about)
            case ["go", *module, "@latest"] if module:
                return self._newest("/".join(module), about)
        raise Refused("path", "refused: no path of a package index")

    def _get(self, url: str, accept: str = "application/json") -> tuple[str, bytes]:
        """Content type and body of a listing, which is asked for once."""
        import httpx

        def ask() -> tuple[str, bytes]:
            headers = {"Accept": accept, "Accept-Encoding": "gzip"}
            try:
                with self._client.stream("GET", url, headers=headers, follow_redirects=True) as reply:
                    if reply.status_code != 200:
                        status = reply.status_code if reply.status_code in (404, 410) else 502
                        raise Unanswered(status, f"the package index answers {reply.status_code}")
                    if reply.headers.get("content-encoding", "identity") not in ("identity", "gzip"):
                        raise Unanswered(502, "the package index packs its answer otherwise than asked")
                    return reply.headers.get("content-type", ""), _bounded(reply.iter_bytes())
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise Unanswered(502, f"the package index does not answer: {type(error).__name__}") from error

        return self._known.get((url, accept), ask)

    # --- PyPI

    def _listing(self, project: str, about: Withheld) -> dict[str, Any]:
        name = canonical(project)
        if not re.fullmatch(r"[a-z0-9-]+", name):
            raise Refused("path", "refused: no name of a project")
        _whole(name, about)
        kind, body = self._get(f"{self.pypi}/{name}/", _SIMPLE)
        if "json" not in kind:
            raise Unanswered(502, "the package index does not speak JSON (PEP 691)")
        listing = json.loads(body)
        if about.covers(name):
            listing["files"] = [file for file in listing["files"] if about.allows(file.get("upload-time"))]
        return listing

    def _project(self, project: str, about: Withheld) -> Document:
        listing = self._listing(project, about)
        listing.pop("versions", None)  # of files that are left out as well; PEP 691's first version has none
        listing["meta"] = {"api-version": "1.0"}
        for file in listing["files"]:
            file["url"] = f"/pypi/files/{canonical(project)}/{urllib.parse.quote(file['filename'])}"
        return Document(json.dumps(listing).encode(), _SIMPLE)

    def _distribution(self, project: str, name: str, about: Withheld) -> File:
        wanted = name.removesuffix(".metadata")
        base = f"{self.pypi}/{canonical(project)}/"
        for file in self._listing(project, about)["files"]:
            if file["filename"] == wanted:
                url = urllib.parse.urljoin(base, file["url"].split("#")[0]) + name[len(wanted):]
                return File(check_file(url, self.pypi), self.pypi)
        raise _gone(name, about.covers(project))

    # --- npm

    def _packument(self, package: str, accept: str, about: Withheld) -> dict[str, Any]:
        if not re.fullmatch(r"(?:@[\w.~-]+/)?[\w.~-]+", package):
            raise Refused("path", "refused: no name of a package")
        _whole(package, about)
        short = _ABBREVIATED in accept and not about.covers(package)  # it tells no times
        _, body = self._get(f"{self.npm}/{urllib.parse.quote(package, safe='@')}",
                            f"{_ABBREVIATED}, application/json; q=0.8" if short else "application/json")
        document = json.loads(body)
        if about.covers(package):
            times = document.get("time", {})
            kept = {version: what for version, what in document["versions"].items() if about.allows(times.get(version))}
            tags = {tag: version for tag, version in document.get("dist-tags", {}).items() if version in kept}
            if kept:
                tags.setdefault("latest", max(kept, key=lambda version: str(times[version])))
            document |= {"versions": kept, "dist-tags": tags,
                         "time": {version: times[version] for version in kept}}
            document.pop("readme", None)
        return document

    def _package(self, package: str, accept: str, about: Withheld, here: str) -> Document:
        document = self._packument(package, accept, about)
        for what in document.get("versions", {}).values():
            archive = what["dist"]["tarball"].split("/")[-1]
            what["dist"]["tarball"] = f"{here}/npm/{package}/-/{archive}"
        return Document(json.dumps(document).encode())

    def _archive(self, package: str, name: str, about: Withheld) -> File:
        for what in self._packument(package, _ABBREVIATED, about).get("versions", {}).values():
            if what["dist"]["tarball"].split("/")[-1] == name:
                return File(check_file(what["dist"]["tarball"], self.npm), self.npm)
        raise _gone(name, about.covers(package))

    # --- Go

    def _module(self, module: str, name: str, about: Withheld) -> Document | File:
        if not re.fullmatch(r"[\w.~!/-]+", module):
            raise Refused("path", "refused: no path of a module")
        plain = _unescaped(module)
        _whole(plain, about)
        if name == "list":
            return Document("".join(f"{version}\n" for version in self._versions(module, about)).encode(), "text/plain")
        version = _unescaped(name.rpartition(".")[0])
        if not _GO_VERSION.fullmatch(version) or not name.endswith((".info", ".mod", ".zip")):
            raise Refused("path", "refused: modules are served by version, not by branch or commit")
        if about.covers(plain) and not about.allows(self._time(module, version)):
            raise _gone(f"{plain}@{version}", True)
        if name.endswith(".zip"):
            stated = self._get(f"{self.go}/{module}/@v/{_escaped(version)}.mod", "*/*")[1].decode("utf-8", "replace")
            if not _GO_MODULE.search(stated):
                raise Refused("repository_host", f"refused: {plain}@{version}: names no Go version in its go.mod; "
                              "repositories that are no Go modules cannot be reached")
        return File(f"{self.go}/{module}/@v/{name}", self.go)

    def _versions(self, module: str, about: Withheld) -> list[str]:
        versions = self._get(f"{self.go}/{module}/@v/list", "*/*")[1].decode().split()
        if not about.covers(_unescaped(module)):
            return versions
        return [version for version in versions[-MAX_VERSIONS:] if about.allows(self._time(module, version))]

    def _newest(self, module: str, about: Withheld) -> Document:
        _whole(_unescaped(module), about)
        if not about.covers(_unescaped(module)):
            return Document(self._get(f"{self.go}/{module}/@latest", "*/*")[1])
        versions = self._versions(module, about)
        if not versions:
            raise _gone(_unescaped(module), True)
        newest = max(versions, key=lambda version: str(self._time(module, version)))
        return Document(self._get(f"{self.go}/{module}/@v/{_escaped(newest)}.info", "*/*")[1])

    def _time(self, module: str, version: str) -> object:
        return json.loads(self._get(f"{self.go}/{module}/@v/{_escaped(version)}.info", "*/*")[1]).get("Time")


def _bounded(parts: Iterable[bytes]) -> bytes:
    """A listing; raises Unanswered where it is longer than any that is of use."""
    found, size = [], 0
    for part in parts:
        found.append(part)
        size += len(part)
        if size > MAX_LISTING:
            raise Unanswered(502, f"the package index's answer has more than {MAX_LISTING >> 20} MiB")
    return b"".join(found)


def _whole(name: str, about: Withheld) -> None:
    """Raises Refused for a package that is withheld whole."""
    if about.covers(name) and about.before is None:
        raise Refused("withheld", f"refused: {name}: the package that this task is about is withheld")


def _gone(name: str, withheld: bool) -> Exception:
    if withheld:
        return Refused("withheld", f"refused: {name}: versions from the fix on are withheld")
    return Unanswered(404, f"{name}: no such file")


def _unescaped(text: str) -> str:
    return re.sub(r"!([a-z])", lambda found: found[1].upper(), text)


def _escaped(text: str) -> str:
    return re.sub(r"[A-Z]", lambda found: "!" + found[0].lower(), text)
