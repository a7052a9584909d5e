"""What strangers' content makes of the host that reads it: logs, archives, fields of rows, what a repository's run says."""

import gzip
import io
import json
import tarfile
import tracemalloc
import zipfile
import zlib

import pytest

from qcn_jax.envs.sandbox import RepositorySpec, repository
from qcn_jax.envs.sandbox.inside import results
from qcn_jax.envs.tasks import formats, log_parsers, swebench
from qcn_jax.envs.tasks.grading import Grader
from qcn_jax.envs.tasks.log_parsers import runner_logs
from qcn_jax.envs.tasks.schema import Task, read_tasks
from qcn_jax.errors import UserError
from tests.attacks.test_rows import ROW, SECONDS, spent
from tests.sandboxes import BROKEN, SOURCE, agent, world  # noqa: F401

LOGS = {
    "colons": "::" * 400_000, "underscores": "_" * 100_000, "underscores and blanks": "_ " * 100_000,
    "parts of django": "x ... Testing against Django installed in \n" * 20_000,
    "errors of django": "x ... Internal Server Error: /\n" * 20_000, "brackets": "PASSED a[" + "[" * 100_000,
    "objects": '{"a":' * 100_000, "no actions": '{"Action": [], "Test": "x"}\n{"Action": {}, "Test": {}}\n'
    '{"Action": "pass", "Test": ["x"], "Package": {}}\n{"Action": "output", "Test": "x", "Output": 5}\n[]\n{"Action": 7}\n',
    "half": "ok 1 - \ud800\nPASSED \udfff\n", "blanks": "ok" + " " * 200_000 + "# # #" * 1000, "opened": "ok 1 (1" * 50_000}


@pytest.mark.parametrize("name", LOGS)
def test_logs_are_read_within_a_limit(name):
    """Whatever tested code prints: outcomes, in time about linear in what was printed."""
    started = spent()
    for parse in log_parsers.PARSERS.values():
        assert all(isinstance(one, str) for pair in parse(LOGS[name]).items() for one in pair)
    for parser in runner_logs.PARSERS:
        runner_logs.messages(parser, LOGS[name])
    assert spent() - started < SECONDS


FIELDS = [("FAIL_TO_PASS", "[" * 100_000), ("PASS_TO_PASS", '{"a":' * 100_000), ("FAIL_TO_PASS", "-" * 100_000 + "1"),
          ("timeout", 1e300), ("timeout", 1e9), ("timeout", 10**400)]


@pytest.mark.parametrize(("field", "value"), FIELDS, ids=lambda value: ascii(value)[:12])
def test_deep_and_endless_fields(tmp_path, field, value):
    """They are faults of their rows, in each of the forms, and the other rows are read."""
    lower = {"FAIL_TO_PASS": "fail_to_pass", "PASS_TO_PASS": "pass_to_pass"}
    pro = {lower.get(key, key): item for key, item in ROW.items() if key != "bug_patch"}
    release = {**ROW, "image": "a/b:1", "eval_script": "x", "log_parser": "parse_log_pytest", "eval_type": "pass_and_fail"}
    release.pop("bug_patch")
    for row, name, read in ((ROW, field, read_tasks), (ROW, field, formats.read), (pro, lower.get(field, field), formats.read),
                            (release, field, swebench.read)):
        if read is swebench.read and field == "timeout":
            continue
        path, faults = tmp_path / "rows.jsonl", []
        path.write_text(json.dumps({**row, "instance_id": "a"}) + "\n" + json.dumps({**row, name: value, "instance_id": "b"}) + "\n")
        found = read(path, faults)
        assert [one.instance_id for one in (found.values() if isinstance(found, dict) else found)] == ["a"]
        assert len(faults) == 1 and ":2: " in faults[0] and "\n" not in faults[0]


@pytest.mark.parametrize(("data", "count", "damaged"), [
    (b"", 0, False), (b'{"key": "k", "n": 0, "start": "a"}\n', 1, False), (b'{"key": "k", "n": 0, "start": "a"}\n{"key": "k", "n": 1, "te', 1, False),
    (b'{"key": "k', 0, False), (b'{"key": "k", "n": 1, "te', 0, True), (b'{"key": "x", "n": 0, "te', 0, True), (b"passed", 0, True),
    (b'{"key": "k", "n": 0, "finished": 0, "tampered": []}\n{"key": "k", "n": 1, "te', 1, True), (b'{"key": "k", "n": 0, "te\n', 0, True)])
def test_records_cut_by_a_time_limit(data, count, damaged):
    """The last record of a process that was killed may be incomplete; whatever else is none is a sign of forgery."""
    found, bad = results.records(data, "k")
    assert (len(found), bad) == (count, damaged)


# --- archives


def tar_of(*members, data=b"x = 1\n"):
    """A tar archive of (name, PAX headers)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, headers in members:
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(data), headers
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_of(method=zipfile.ZIP_STORED, flag=0):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/x.py", "x = 1\n" * 100)
    data = bytearray(buffer.getvalue())
    at, central = 0, data.index(b"PK\x01\x02")
    for place, offset in ((at, 6), (central, 8)):
        data[place + offset] |= flag
        data[place + offset + 2] = method
    return bytes(data)


def spoiled(data):
    """A gzip file whose stream breaks in the middle."""
    packed = bytearray(gzip.compress(data, mtime=0))
    packed[len(packed) // 2:len(packed) // 2 + 40] = b"\xff" * 40
    return bytes(packed)


ARCHIVES = {
    "time that is no number": tar_of(("a/x.py", {"mtime": "nan"})), "time without end": tar_of(("a/x.py", {"mtime": "inf"})),
    "time beyond time": tar_of(("a/x.py", {"mtime": "1e30"})), "size below nothing": tar_of(("a/x.py", {"size": "-1000"})),
    "half a name": tar_of(("a/\udcff.py", {})), "name of a folder": tar_of(("a/x.py", {}), ("a/x.py/y.py", {})),
    "long name": tar_of(("a/" + "b" * 300 + ".py", {}), ("a/y.py", {})), "NUL": tar_of(("a/x.py", {"path": "a/x\0y.py"})),
    "encrypted": zip_of(flag=1), "method": zip_of(method=97), "deflated": zip_of(method=8), "lzma": zip_of(method=14),
    "broken": spoiled(tar_of(*((f"a/{n}.py", {}) for n in range(50)), data=bytes(zlib.crc32(b"%d" % n) & 255 for n in range(5000))))}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_are_none(world, tmp_path, name):  # noqa: F811
    """They are refused in one line, or what can be used of them is."""
    path = tmp_path / "a-1.tar.gz"
    path.write_bytes(ARCHIVES[name])
    try:
        world.provider.prepare(RepositorySpec("a==1", str(path)))
    except UserError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        with world.provider.create("a==1") as place:
            assert place.exec("true").exit_code == 0


def test_headers_as_large_as_memory(tmp_path):
    """A megabyte that unpacks to a name of half a gigabyte is not unpacked."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 500_000_000
    path = tmp_path / "a-1.tar.gz"
    with gzip.open(path, "wb", 1) as stream:
        stream.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(500):
            stream.write(bytes(1_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(UserError):
            repository.unpack(RepositorySpec("a==1", str(path)))
        assert tracemalloc.get_traced_memory()[1] < 2 * repository.MAX_BYTES
    finally:
        tracemalloc.stop()


# --- what the first run of a repository says


LIES = """
import gc, sys, types
class Name(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def pytest_sessionfinish(session):
    fake = types.ModuleType('x')
    fake.__spec__ = types.SimpleNamespace(name=Name('x'), origin='built-in')
    sys.modules.update({f'x{n}': fake for n in range(400_000)})
    for o in gc.get_objects():
        if getattr(o, '__qualname__', '') == 'watch_opened.<locals>.hook':
            next(c.cell_contents for c in o.__closure__ if isinstance(c.cell_contents, list)).extend([[], {}, 5])
"""


def test_a_repository_that_lies_about_its_first_run(world, agent, tmp_path):  # noqa: F811
    """What it says to have imported and opened neither ends nor delays the server, nor the host."""
    for path, text in {"conftest.py": LIES, "pkg/__init__.py": "x = 2\n", "tests/test_x.py": "import pkg\ndef test_x(): assert pkg.x == 2\n"
                       }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    world.provider.prepare(RepositorySpec("liar==1", str(tmp_path)))
    with world.provider.create("liar==1") as place:
        assert place._server is agent._server and place.exec("echo alive").output == "alive\n"
    assert agent.read(SOURCE) == BROKEN and agent.exec("echo alive").output == "alive\n"
    bug = "--- a/pkg/__init__.py\n+++ b/pkg/__init__.py\n@@ -1 +1 @@\n-x = 2\n+x = 3\n"
    fix = bug.replace("-x = 2\n+x = 3", "-x = 3\n+x = 2")
    task = Task("liar__1", "liar==1", "", fix, "", "x", ("tests/test_x.py::test_x",), (), bug_patch=bug)
    assert Grader(world.provider).grade(task, fix).outcome in ("resolved", "unresolved", "suspected_exploit")
