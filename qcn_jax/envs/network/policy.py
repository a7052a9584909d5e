"""What an agent may fetch: which hosts, and what is withheld of the package that its task is about."""

import dataclasses
import datetime
import ipaddress
import json
import re
import tomllib
import urllib.parse
from collections.abc import Mapping

from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.testpaths import is_test_path

NETWORKS = ("none", "filtered")
# Of languages, their tools and much-used libraries. Read the docs' pages are people's own, the names its projects'.
DOCUMENTATION = (
    "docs.python.org", "packaging.python.org", "peps.python.org", "docs.pytest.org", "pip.pypa.io",
    "setuptools.pypa.io", "numpy.org", "docs.scipy.org", "pandas.pydata.org", "matplotlib.org", "scikit-learn.org",
    "docs.djangoproject.com", "flask.palletsprojects.com", "docs.sqlalchemy.org", "nodejs.org", "docs.npmjs.com",
    "developer.mozilla.org", "www.typescriptlang.org", "go.dev", "pkg.go.dev", "git-scm.com", "www.gnu.org",
    "*.readthedocs.io",
)  # fmt: skip
# Where repositories are, refused as everything else that is not listed, and counted apart.
REPOSITORIES = re.compile(
    r"(?:^|\.)(?:github|gitlab|bitbucket|codeberg|sourceforge|gitee|sr\.ht|githubusercontent|githubassets|jsdelivr|unpkg|"
    r"codeload|savannah|launchpad|googlesource|softwareheritage)(?:\.|$)")
_NUMBERS = re.compile(r"(?:0x[\da-f]+|\d+)(?:\.(?:0x[\da-f]+|\d+))*")  # what resolvers take for an address
# Sphinx's copies of the documented source, and where Read the Docs gives whole sites as archives.
SOURCE_PAGES = ("_modules", "_downloads", "_")
# What names of one project differ by: python-dateutil and dateutil, gopkg.in/yaml.v3, djangoproject.com.
_AFFIXES = re.compile(r"^(?:python|py)-|-(?:python|py)$|-v\d+$|project$")
_PACKAGE = re.compile(r"(?:src/|lib/|python/)?(\w+)/__init__\.py")


# What names a distribution; pyproject.toml and package.json are read as what they are.
_NAMES = {"PKG-INFO": r"(?m)^Name: *(\S+)", "setup.cfg": r"(?m)^name *= *(\S+)", "go.mod": r"(?m)^module\s+(\S+)",
          "setup.py": r"\bname\s*=\s*[\"']([\w.-]+)[\"']"}  # fmt: skip


class Refused(Exception):
    """A request that is not answered: by which rule, and what the agent is told."""

    def __init__(self, rule: str, message: str):
        super().__init__(message)
        self.rule = rule


@dataclasses.dataclass(frozen=True)
class Withheld:
    """The package that a task is about.

    Attributes:
      names: under which it may be found, as `canonical` writes them.
      before: what was published earlier may be fetched; None withholds the package whole.
    """

    names: frozenset[str]
    before: datetime.datetime | None = None

    def covers(self, name: str) -> bool:
        """Whether `name`, or a part of it between slashes (@scope/name, github.com/owner/name/v2), is the package's."""
        return any(form in self.names for part in (name, *name.split("/"))
                   for form in (canonical(part), _AFFIXES.sub("", canonical(part))))

    def allows(self, published: object) -> bool:
        """Whether a file of the package that was published at this time (ISO 8601) may be fetched."""
        moment = _moment(published)
        return self.before is not None and moment is not None and moment < self.before


def canonical(name: str) -> str:
    """A package's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name.strip().lower())


def _moment(text: object) -> datetime.datetime | None:
    try:
        moment = datetime.datetime.fromisoformat(str(text).strip())
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)


def fix_date(task: Task) -> str:
    """When the task's fix was made; "" where unknown, or where a defect was put in: all releases then hold the fix."""
    return "" if task.bug_patch else task.created_at


def withheld(repository: str, files: Mapping[str, str], date: str) -> Withheld:
    """What is withheld in a sandbox.

    Args:
      repository: by the name that tasks use: "toolz==1.2.0", "owner/name".
      files: its text files, which say the names of its distribution.
      date: ISO 8601, see `fix_date`.
    """
    names = {re.split(r"[=<>@ ]", repository)[0].rstrip("/").split("/")[-1].split("__")[-1]}
    names |= {found[1] for path in files if not is_test_path(path) and (found := _PACKAGE.fullmatch(path))}
    for path, pattern in _NAMES.items():
        names |= {match[1] for match in [re.search(pattern, files.get(path, ""))] if match}
    for path, read in (("pyproject.toml", tomllib.loads), ("package.json", json.loads)):
        try:
            project = read(files.get(path, ""))
            names |= {str(part["name"]) for part in (project, project.get("project", {}), project.get("tool", {}).get(
                "poetry", {})) if "name" in part}
        except (ValueError, AttributeError, TypeError, RecursionError):  # the repository's fault, and none here
            pass
    parts = {part for name in names for part in (name, re.sub(r"/v\d+$", "", name).split("/")[-1])}
    return Withheld(frozenset(map(canonical, filter(None, parts))), _moment(date) if date else None)


def documentation(url: str, about: Withheld) -> str:
    """The HTTPS address of a page of documentation.

    Args:
      url: as a client asks for it through the proxy: http://HOST/PATH. What stands behind the path is left out.
      about: the package whose pages are withheld.

    Raises:
      Refused: no such host, or the pages are about that package, or copies of source.
    """
    parts = urllib.parse.urlsplit(url)
    host = (parts.hostname or "").rstrip(".").lower()
    check_host(host)
    path = urllib.parse.unquote(parts.path)
    if parts.username is not None or parts.scheme != "http" or not re.search(r"^[^:@]+(?::(?:80|443))?$", parts.netloc):
        raise Refused("other_host", f"refused: {parts.netloc}: write http://{host}{parts.path}")
    if any(map(about.covers, host.split("."))) or about.covers(path.strip("/")):
        raise Refused("withheld", "refused: the documentation of the package that this task is about is withheld")
    if set(path.split("/")) & set(SOURCE_PAGES):
        raise Refused("withheld", "refused: pages that hold source are withheld")
    return f"https://{host}{parts.path or '/'}"


def check_host(host: str) -> None:
    """Raises Refused, by the rule that fits, for a host that is none of documentation."""
    known = host in DOCUMENTATION or any(
        name.startswith("*.") and host.endswith(name[1:]) and host.count(".") == name.count(".")
        for name in DOCUMENTATION)
    if known:
        return
    rule = "other_host" if not is_address(host) else "address"
    if REPOSITORIES.search(host):
        raise Refused("repository_host", f"refused: {host}: repositories cannot be reached; solve the task with the "
                      "files that are there")
    raise Refused(rule, f"refused: {host}: only package indexes and some documentation can be reached")


def is_address(host: str) -> bool:
    """Whether a host is written as an address, in any form that resolvers take for one."""
    try:
        ipaddress.ip_address(host.strip("[]"))
        return True
    except ValueError:
        return _NUMBERS.fullmatch(host) is not None


def check_file(url: str, index: str) -> str:
    """`url` where it may be fetched because a package index names it, or leads on to it.

    Whoever publishes a package may have written it: beside the index's own server only others by HTTPS and name are
    asked, and none that holds repositories.

    Raises:
      Refused: it may not.
    """
    parts = urllib.parse.urlsplit(url)
    host = (parts.hostname or "").rstrip(".").lower()
    if (parts.scheme, parts.netloc) == urllib.parse.urlsplit(index)[:2]:
        return url
    if REPOSITORIES.search(host):
        raise Refused("repository_host", f"refused: {host}: repositories cannot be reached")
    if parts.scheme != "https" or is_address(host) or "." not in host or parts.username is not None:
        raise Refused("address", f"refused: the index names a file at {parts.scheme}://{host}")
    return url
