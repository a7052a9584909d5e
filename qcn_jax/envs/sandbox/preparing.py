"""What is done with a repository once, before sandboxes are made of it: unpacked, compiled, its tests run, and kept."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from qcn_jax.envs.sandbox import channel, pytest_options, repository
from qcn_jax.envs.sandbox.repository import RepositorySpec
from qcn_jax.envs.sandbox.runs import TestRun, test_run
from qcn_jax.envs.web import page_tests, running, vendored
from qcn_jax.envs.web import runtime as browser

ANSWER_GRACE = 30.0  # seconds beyond a job's own limit after which the server itself is taken for dead
STARVATION = 5.0  # on a busy machine a job may take this many times its limit (inside/server.py, STARVED)
PREPARE_TIMEOUT = 300.0
FIRST_LOOK = 1800.0  # for all tests of pages; a page that hangs is given up long before


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A repository ready for use: its pristine text files, and the archive that servers load."""

    spec: RepositorySpec
    key: str
    files: Mapping[str, str]
    settings: Mapping[str, Any]
    archive: str
    baseline: TestRun  # all tests on the pristine state

    @property
    def browser(self) -> bool:
        """Whether its tests are of pages, which are run in a browser (envs/web)."""
        return any(map(page_tests.is_tests, self.files))

    @property
    def builds(self) -> bool:
        """Whether its pages are built first, of vendored modules."""
        return "vendored" in self.settings


class Start(Protocol):
    """Provider._start."""

    def __call__(self, prepared: RepositorySpec | None, networked: bool = False, browser: bool = False
                 ) -> channel.Server: ...


def prepare(spec: RepositorySpec, state_dir: str, fingerprint: str, start: Start) -> Prepared:
    """Prepares a repository, or finds it in `state_dir`.

    Args:
      spec: the repository.
      state_dir: where what is prepared is kept.
      fingerprint: of the interpreter and pytest that byte code is prepared for.
      start: starts a server.

    Raises:
      UserError: the archive is missing, damaged or not the one that was meant.
      SandboxError: no sandbox could be started, or modules that pages are built from are missing.
    """
    key = repository.key(spec, fingerprint)
    found = repository.load(state_dir, key)
    if found is None or not _current(spec, found):
        with repository.lock(state_dir, key):
            found = repository.load(state_dir, key)
            if found is None or not _current(spec, found):
                found = _prepare(spec, key, state_dir, start)
    return Prepared(spec, key, found.files, found.settings, found.archive, test_run(found.baseline))


def _current(spec: RepositorySpec, found: repository.Stored) -> bool:
    """Whether pages are still tested by the programs, and built from the modules, of the run that is kept."""
    if not any(map(page_tests.is_tests, found.files)):
        return True
    browser.check("docker")  # whichever kind this is: for the programs' version
    if "vendored" in found.settings:
        vendored.folder(spec.modules)
    return found.settings.get("driver") == browser.digest() and found.settings.get("vendored", "") in (
        "", vendored.digest(spec.modules))


def _prepare(spec: RepositorySpec, key: str, state_dir: str, start: Start) -> repository.Stored:
    members = repository.unpack(spec)
    settings = repository.settings(spec, members)
    texts = repository.text_files((name, member.data) for name, member in members.items())
    if any(map(page_tests.is_tests, texts)):
        suites = page_tests.suites(texts)
        browser.check("docker")
        settings["driver"] = browser.digest()
        if page_tests.builds(suites):
            vendored.folder(spec.modules)
            settings["vendored"] = vendored.digest(spec.modules)
        with _unprepared(spec, key, members, settings, start, pages=True) as ask:
            def call(script: str, args: Any, timeout: float, without: Any = None) -> dict[str, Any]:
                return ask("python", timeout, script=script, args=args, without=without)[0]

            first = running.run_tests(call, suites, None, FIRST_LOOK)
        return repository.store(state_dir, key, members, settings, first)

    def warm_up(changed: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
        """One run of all tests that also compiles, in a server of its own."""
        with _unprepared(spec, key, members, changed, start) as ask:
            return ask("tests", PREPARE_TIMEOUT, kind="warm", node_ids=None, fail_fast=False)

    (reply, payload), settings = pytest_options.followed(texts, settings, warm_up)
    offset = 0
    for path, (size, mtime) in reply.pop("compiled").items():
        members[path] = repository.Member(payload[offset:offset + size], 0o644, mtime)
        offset += size
    settings["modules"], settings["opened"] = reply.pop("modules", []), reply.pop("opened", [])
    return repository.store(state_dir, key, members, settings, reply)


@contextlib.contextmanager
def _unprepared(spec: RepositorySpec, key: str, members: Mapping[str, repository.Member], settings: Mapping[str, Any],
                start: Start, pages: bool = False) -> Iterator[Callable[..., tuple[dict[str, Any], bytes]]]:
    """Yields what asks a workspace in a server of its own: (operation, timeout, its arguments) -> reply."""
    with contextlib.closing(start(spec, browser=pages)) as server:
        server.call({"op": "load", "tree": key, "settings": settings}, repository.pack(members), ANSWER_GRACE)
        made, _ = server.call({"op": "create", "tree": key, "overlay": {}}, b"", ANSWER_GRACE)
        yield lambda op, timeout, **given: server.call(
            {"op": op, "workspace": made["workspace"], "timeout": timeout, **given}, b"",
            STARVATION * timeout + ANSWER_GRACE)
