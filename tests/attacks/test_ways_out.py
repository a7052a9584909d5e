"""What agents get out of the proxy that is their sandbox's only way out, and what indexes and publishers make of it."""

import contextlib
import http.client
import http.server
import json
import socket
import tracemalloc

import pytest

from qcn_jax.envs.network import policy
from qcn_jax.envs.network.policy import Refused, documentation, withheld
from qcn_jax.envs.network.proxy import Gate, Outside
from tests.envs.network.local_index import FIX, NEW, OLD, Index, serving

DEEP = "[" * 100_000
TARBALLS = {"metadata": "http://169.254.169.254/latest/meta-data", "inside": "http://127.0.0.1:{service}/secret", "number": "https://2130706433/x",
            "repository": "https://codeload.github.com/a/victim/tar.gz/fix", "plain": "http://files.example.org/x.tgz", "file": "file:///etc/passwd",
            "name": "https://localhost/x", "user": "https://a@files.example.org/x.tgz", "moved": "http://127.0.0.1:{index}/moved.tgz",
            "round": "http://127.0.0.1:{index}/round.tgz", "none": 7, "odd": "http://[", "there": "http://127.0.0.1:{index}/there.tgz"}


class Hostile(Index):
    """An index whose publishers write what they like."""

    def do_GET(self):
        self.server.seen.append(self.path)
        service = self.server.service.server_address[1]
        if self.path in ("/moved.tgz", "/round.tgz"):
            self.send_response(302)
            self.send_header("Location", self.path if "round" in self.path else f"http://127.0.0.1:{service}/secret")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path.endswith("/endless/"):
            self.send_response(200)
            self.send_header("Content-Type", "application/vnd.pypi.simple.v1+json")
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b" " * 60_000)
        super().do_GET()

    def reply(self, parts):
        ports = {"index": self.server.server_address[1], "service": self.server.service.server_address[1]}
        match parts:
            case ["npm", name] if name in TARBALLS:
                url = TARBALLS[name] if isinstance(TARBALLS[name], int) else TARBALLS[name].format(**ports) if "[" not in TARBALLS[name] else "http://["
                return "application/json", json.dumps({"versions": {"1.0": {"dist": {"tarball": url}}}}).encode()
            case ["there.tgz"]:
                return "application/octet-stream", b"there"
            case ["simple", "deep"]:
                return "application/json", DEEP.encode()
            case ["simple", "list"]:
                return "application/json", b"[]"
            case ["simple", "names"]:
                return "application/json", json.dumps({"files": [{"filename": 7, "url": 7}]}).encode()
            case ["simple", "large"]:
                return "application/json", json.dumps({"files": [], "x": "y" * 3_000_000}).encode()
        return super().reply(parts)


class Service(http.server.BaseHTTPRequestHandler):
    """Something of this machine's that only it may ask."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.seen.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"secret")


@pytest.fixture(scope="module", name="gate")
def _gate():
    with pytest.MonkeyPatch.context() as environment, serving(Service) as service, serving(Hostile, service=service) as index:
        here = f"http://127.0.0.1:{index.server_address[1]}"
        for name, value in (("PIP_INDEX_URL", f"{here}/simple"), ("npm_config_registry", f"{here}/npm"), ("GOPROXY", f"{here}/go")):
            environment.setenv(name, value)
        gate = Gate(socket.create_server(("127.0.0.1", 0)), Outside())
        gate.index, gate.service = index, service
        yield gate
        gate.close()
        gate.outside.close()


def ask(gate, path):
    """(status, body, what was counted, bytes) of an agent's request."""
    with gate.open(withheld("victim==1.2.3", {}, FIX)) as visit:
        connection = http.client.HTTPConnection(*gate.socket.getsockname()[:2], timeout=60)
        connection.request("GET", path)
        reply = connection.getresponse()
        found = reply.status, reply.read(), dict(visit.counts)
        connection.close()
        return *found, visit.bytes


@pytest.mark.parametrize("name", TARBALLS)
def test_files_lie_where_the_index_is_or_at_named_hosts_behind_tls(gate, name):
    """npm's documents say where an archive lies, and whoever published it may have written that."""
    place = str(TARBALLS[name]).split("/")[-1]
    status, body, counted, _ = ask(gate, f"/npm/{name}/-/{place}")
    if name == "there":
        assert (status, body) == (200, b"there")
    else:
        assert status in (403, 502) and b"secret" not in body and not gate.service.seen


@pytest.mark.parametrize("name", ["deep", "list", "names", "endless"])
def test_listings_of_another_form(gate, name):
    """One line and a status for the agent; the proxy goes on, with as much memory as before."""
    tracemalloc.start()
    status, body, _, _ = ask(gate, f"/pypi/simple/{name}/")
    assert status == 502 and body.count(b"\n") == 1 and tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()
    assert ask(gate, "/pypi/simple/helper/")[0] == 200


def test_listings_count_as_what_a_command_may_fetch(gate):
    assert ask(gate, "/pypi/simple/large/")[3] > 3_000_000


FOREIGN = "/go/example.org/foreign/python-victim2/@v"  # a repository in Python; Go's proxy makes modules of any


@pytest.mark.parametrize("path, status", [
    (f"{FOREIGN}/v1.0.0.zip", 403), (f"{FOREIGN}/v0.0.0-20240101000000-0123456789ab.zip", 403), (f"{FOREIGN}/v1.0.0.mod", 200),
    ("/go/example.org/other/@v/v1.0.0.zip", 200), ("/go/example.org/owner/python-victim/@v/v1.2.0.zip", 403),
    ("/go/gopkg.in/victim.v1/@v/v1.2.0.zip", 403), ("/go/gopkg.in/owner/victim.v1/@v/v1.2.0.zip", 403)])
def test_go_modules_are_no_way_to_other_repositories(gate, path, status):
    assert ask(gate, path)[0] == status


FILES = {"src/dateutil/__init__.py": "", "tests/__init__.py": "", "PKG-INFO": "Name: python-dateutil\n"}


@pytest.mark.parametrize("repository, files, url", [
    ("Django==5.0", {}, "http://docs.djangoproject.com/en/dev/releases/5.0.1/"), ("x==1", FILES, "http://dateutil.readthedocs.io/en/stable/"),
    ("tabulate==0.9", {}, "http://python-tabulate.readthedocs.io/"), ("x==1", {}, "http://other.readthedocs.io/_/downloads/en/stable/htmlzip/"),
    ("x==1", {}, "http://other.readthedocs.io/%5f/downloads/en/stable/htmlzip/")])
def test_documentation_of_the_package_by_its_other_names(repository, files, url):
    with pytest.raises(Refused) as caught:
        documentation(url, withheld(repository, files, ""))
    assert caught.value.rule == "withheld"
    assert documentation("http://other.readthedocs.io/en/stable/", withheld(repository, files, "")).startswith("https://")


@pytest.mark.parametrize("name", ["python-dateutil", "dateutil", "Python_Dateutil", "py-dateutil", "@a/dateutil", "gopkg.in/dateutil.v2"])
def test_the_package_by_its_other_names(name):
    about = withheld("x==1", FILES, "")
    assert about.covers(name) and not about.covers("tests") and not about.covers("dateutils")


@pytest.mark.parametrize("path", ["package.json", "pyproject.toml", "setup.py", "setup.cfg", "PKG-INFO", "go.mod"])
@pytest.mark.parametrize("text", [DEEP, f"a = {DEEP}", "project = 1\n", "name = " + " " * 200_000, '{"name": {}}', "\ud800"])
def test_repositories_whose_declarations_are_odd(path, text):
    """They are read whenever an agent's command runs, and must not end its episode."""
    assert withheld("toolz==1.2.0", {path: text}, "").covers("toolz")


@pytest.mark.parametrize("moment", [OLD, NEW, "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "x" * 10**6, "２０２０-01-01", ""])
def test_dates_of_any_form(moment):
    about = withheld("victim==1.2.3", {}, moment)
    assert about.before is None or not about.allows(moment)


def test_requests_of_any_form(gate):
    """None ends the proxy or reaches another host."""
    for path in ("http://127.0.0.1@docs.python.org/", "http://docs.python.org\\@127.0.0.1/", "http://[::1", "//docs.python.org/x", "*", "http:",
                 "/npm/%00", "/pypi/simple/%E2%84%AA/", "/npm/a%0d%0ax", "http://docs.python.org:99999/", "/go/%2e%2e/%2e%2e/@v/v1.0.0.zip"):
        with socket.create_connection(gate.socket.getsockname()[:2], timeout=60) as line, gate.open(policy.withheld("x", {}, "")):
            line.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            assert line.makefile("rb").read().split()[1] in (b"400", b"403", b"404", b"502"), path
    assert not gate.service.seen
