"""What the proxy serves of packages and of documentation, and what it withholds."""

import json

import httpx
import pytest

from qcn_jax.envs.network import policy
from qcn_jax.envs.network.indexes import Document, Indexes, Unanswered
from qcn_jax.envs.network.policy import Refused, Withheld, documentation, withheld
from tests.envs.network.local_index import FIX, Index, serving
from tests.sandboxes import make_task

HERE = "http://127.0.0.1:3128"


@pytest.fixture(name="indexes", scope="module")
def _indexes():
    with serving(Index) as server, httpx.Client() as client:
        here = f"http://127.0.0.1:{server.server_address[1]}"
        yield Indexes(client, {"PIP_INDEX_URL": f"{here}/simple/", "npm_config_registry": f"{here}/npm/",
                               "GOPROXY": f"{here}/go|direct"})


def about(date: str) -> Withheld:
    return withheld("victim==1.2.3", {"go.mod": "module example.org/victim/v2\n"}, date)


def ask(indexes, path, date=FIX, accept="application/json"):
    """What is served: a document read, a file's address, or by which rule it is refused."""
    try:
        answer = indexes.answer(path, accept, about(date), HERE)
    except Refused as error:
        return error.rule
    except Unanswered as error:
        return error.status
    if isinstance(answer, Document):
        return json.loads(answer.body) if answer.body[:1] == b"{" else answer.body.decode().split()
    return answer.url.split("/", 3)[3]


def test_pypi(indexes):
    names = lambda listing: [file["filename"].split("-")[1] for file in listing["files"]]
    assert names(ask(indexes, "/pypi/simple/helper/")) == ["1.0"]
    assert names(ask(indexes, "/pypi/simple/Victim/")) == ["1.2.2"]
    assert names(ask(indexes, "/pypi/simple/victim/", "2021-06-02")) == ["1.2.2", "1.2.3", "1.3.0"]
    assert ask(indexes, "/pypi/simple/helper/")["files"][0]["url"] == "/pypi/files/helper/helper-1.0-py3-none-any.whl"
    file = "/pypi/files/victim/victim-{}-py3-none-any.whl".format
    assert ask(indexes, file("1.2.2")) == "files/victim-1.2.2-py3-none-any.whl"
    assert ask(indexes, file("1.2.2") + ".metadata") == "files/victim-1.2.2-py3-none-any.whl.metadata"
    assert [ask(indexes, file(version)) for version in ("1.2.3", "1.3.0")] == ["withheld"] * 2
    # In another project's name, and where no date is known.
    assert ask(indexes, "/pypi/files/helper/victim-1.2.3-py3-none-any.whl") == 404
    assert ask(indexes, "/pypi/simple/VICTIM", date="") == ask(indexes, file("1.2.2"), date="") == "withheld"
    assert ask(indexes, "/pypi/simple/victim", date="no date") == "withheld"
    assert ask(indexes, "/pypi/simple/none") == 404


def test_npm(indexes):
    short = "application/vnd.npm.install-v1+json"
    assert list(ask(indexes, "/npm/helper", accept=short)["versions"]) == ["1.0"]
    found = ask(indexes, "/npm/victim", accept=short)
    assert list(found["versions"]) == ["1.2.2"] and found["dist-tags"] == {"latest": "1.2.2"} and len(found["time"]) == 1
    assert found["versions"]["1.2.2"]["dist"]["tarball"] == f"{HERE}/npm/victim/-/victim-1.2.2.tgz"
    assert ask(indexes, "/npm/victim/-/victim-1.2.2.tgz") == "tarballs/victim-1.2.2.tgz"
    assert ask(indexes, "/npm/victim/-/victim-1.2.3.tgz") == ask(indexes, "/npm/@fork%2fvictim", date="") == "withheld"
    assert ask(indexes, "/npm/-/v1/security/audits") == "path"


def test_go(indexes):
    module = "/go/example.org/!owner/victim/v2"
    assert ask(indexes, f"{module}/@v/list") == ["v1.0.0"]
    assert ask(indexes, f"{module}/@latest")["Version"] == "v1.0.0"
    assert ask(indexes, f"{module}/@v/v1.0.0.zip") == "go/example.org/!owner/victim/v2/@v/v1.0.0.zip"
    pseudo = "v0.0.0-20240101000000-0123456789ab"
    assert [ask(indexes, f"{module}/@v/{version}.zip") for version in ("v1.1.0", "v1.2.0", pseudo)] == ["withheld"] * 3
    other = "/go/example.org/other"
    assert ask(indexes, f"{other}/@v/list") == ["v1.0.0", "v1.1.0", "v1.2.0"]
    assert ask(indexes, f"{other}/@v/{pseudo}.mod").endswith(f"{pseudo}.mod")
    # A module proxy serves any repository at any commit; a branch or a commit is no version.
    assert [ask(indexes, f"{other}/@v/{name}") for name in ("main.info", "0123abcd.info", "v1.0.0.exe")] == ["path"] * 3
    assert ask(indexes, f"{module}/@v/list", date="") == "withheld"


@pytest.mark.parametrize("path", ["/", "/pypi/simple/", "/pypi/victim/json", "/pypi/simple/../helper", "/files/x.whl",
                                  "/pypi/simple/a%2fb", "/npm/", "/npm/..%2f..", "/go/@v/list", "/simple/helper", "//x/y"])
def test_other_paths(indexes, path):
    assert ask(indexes, path) == "path"


@pytest.mark.parametrize("url, rule", [
    ("http://docs.python.org/3/library/re.html?x=secret", None), ("http://toolz.readthedocs.io/en/latest/", None),
    ("http://DOCS.PYTHON.ORG:80/3/", None), ("http://github.com/a/b", "repository_host"),
    ("http://raw.githubusercontent.com/a", "repository_host"), ("http://codeload.github.com/a", "repository_host"),
    ("http://gitlab.com/a", "repository_host"), ("http://bitbucket.org/a", "repository_host"),
    ("http://140.82.112.3/", "address"), ("http://[::1]/", "address"), ("http://0x7f.1/", "address"),
    ("http://2130706433/", "address"), ("http://169.254.169.254/latest/meta-data", "address"),
    ("http://localhost/", "other_host"), ("http://c2VjcmV0.evil.example/", "other_host"),
    ("http://docs.python.org.evil.example/", "other_host"), ("http://a.b.readthedocs.io/", "other_host"),
    ("http://readthedocs.io/", "other_host"), ("http://docs.python.org:22/", "other_host"),
    ("http://docs.python.org@evil.example/", "other_host"), ("http://x@docs.python.org/", "other_host"),
    ("ftp://docs.python.org/", "other_host"), ("http:///", "other_host"),
    ("http://victim.readthedocs.io/en/stable/", "withheld"), ("http://pkg.go.dev/example.org/victim", "withheld"),
    ("http://toolz.readthedocs.io/en/latest/_modules/toolz.html", "withheld"),
    ("http://toolz.readthedocs.io/en/latest/%5Fmodules/toolz.html", "withheld")])
def test_documentation(url, rule):
    if rule is None:
        found = documentation(url, about(""))
        assert found.startswith("https://") and "secret" not in found
    else:
        with pytest.raises(Refused) as caught:
            documentation(url, about(""))
        assert caught.value.rule == rule


@pytest.mark.parametrize("repository, files, names", [
    ("toolz==1.2.0", {}, {"toolz"}), ("psf/requests", {"setup.py": "setup(\n    name='requests',\n)"}, {"requests"}),
    ("yaml__pyyaml", {"PKG-INFO": "Metadata-Version: 2\nName: PyYAML\n\nName: x\n"}, {"pyyaml"}),
    ("repo", {"pyproject.toml": "[project]\nname = 'a.b'", "setup.cfg": "[metadata]\nname = c_d\n"}, {"repo", "a-b", "c-d"}),
    ("repo", {"pyproject.toml": "name = ["}, {"repo"}), ("repo", {"package.json": '{"name": "@a/b"}'}, {"repo", "@a/b", "b"}),
    ("x", {"go.mod": "module example.org/a/tool/v3\n"}, {"x", "example-org/a/tool/v3", "tool"})])
def test_names_of_the_package_under_test(repository, files, names):
    assert withheld(repository, files, "").names == names


def test_a_defect_that_was_put_in_withholds_every_release():
    """All releases hold the right code; only a fix that was really made has a date."""
    task = make_task()
    assert task.bug_patch and policy.fix_date(task) == ""
