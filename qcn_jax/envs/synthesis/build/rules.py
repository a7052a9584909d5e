"""How a repository is installed and tested, read from its own declarations; no command is run here."""

import configparser
import dataclasses
import json
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax.envs.sandbox.images import APT_FOLDERS
from qcn_jax.errors import UserError

PYTHON = "/opt/env/bin/python"
_TEST_GROUPS = ("test", "tests", "testing", "dev", "develop", "ci")
_REQUIREMENTS = ("requirements-test.txt", "requirements-tests.txt", "requirements_test.txt", "test-requirements.txt",
                 "requirements-dev.txt", "requirements_dev.txt", "dev-requirements.txt", "requirements/test.txt",
                 "requirements/tests.txt", "requirements/dev.txt", "requirements/testing.txt")
# Of the packages that test groups list, those that tests never import.
_NEVER_NEEDED = re.compile(r"^(?:black|ruff|flake8|mypy|pylint|isort|sphinx|furo|tox|nox|hatch|twine|build|pre-commit|"
                           r"coveralls|codecov|bump|check-manifest|wheel)\b", re.IGNORECASE)
_VERSIONED_BY_GIT = re.compile(r"setuptools[-_]scm|hatch-vcs|versioningit|setuptools-git-versioning|pbr\b|dunamai")
_NODE_WRAPPERS = re.compile(r"^(?:npx |cross-env (?:\w+=\S+ )*|nyc (?:-\S+ )*|c8 (?:-\S+ )*)+")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An environment: Debian packages, variables, commands that install, the command that tests, and its log's parser.

    Commands run in the repository's folder; `why` names the declarations that decided.
    """

    language: str
    packages: tuple[str, ...]
    install: tuple[str, ...]
    test: str
    parser: str
    variables: tuple[tuple[str, str], ...] = ()
    why: tuple[str, ...] = ()

    def toolchain(self, base: str) -> str:
        """The Dockerfile of what the language needs: the layer that repositories share."""
        lines = [f"FROM {base}", "USER root"]
        if self.packages:
            lines.append(f"RUN mkdir -p {APT_FOLDERS} && "
                         "apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "
                         f"--no-install-recommends {' '.join(self.packages)} && apt-get clean && "
                         "rm -rf /var/lib/apt/lists/*")
        lines += [f"ENV {name}={value}" for name, value in self.variables]
        return "\n".join([*lines, "WORKDIR /testbed", ""])

    def dockerfile(self, base: str) -> str:
        """The whole Dockerfile, to be built in the repository's folder."""
        steps = [f"RUN {command}" for command in self.install]
        command = f'CMD ["sh", "-c", {json.dumps(self.test)}]'
        return self.toolchain(base) + "\n".join(["COPY . /testbed", *steps, command, ""])


def plan(files: Mapping[str, str]) -> Recipe:
    """The recipe that a repository's declarations ask for.

    Raises:
      UserError: no language that is known here, or declarations that are of another form.
    """
    try:
        return _plan(files)
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        known = ", ".join(name for name in ("package.json", "pyproject.toml", "setup.cfg", "tox.ini") if name in files)
        raise UserError(f"{known}: is not of the form that it should have: {error}") from error


def _plan(files: Mapping[str, str]) -> Recipe:
    if "go.mod" in files:
        return _go(files)
    python = [name for name in ("pyproject.toml", "setup.py", "setup.cfg") if name in files]
    if python or ("package.json" not in files and any(path.endswith(".py") for path in files)):
        return _python(files, python)
    if "package.json" in files:
        return _node(files)
    raise UserError("no go.mod, package.json, pyproject.toml, setup.cfg, setup.py or Python file at the top")


def _go(files: Mapping[str, str]) -> Recipe:
    return Recipe(
        "go", ("golang-go", "ca-certificates", "git"), ("go mod download", "go test -run '^$' ./..."),
        "go test -count=1 -json ./...", "go_test",  # a run that is only remembered says nothing of flaky tests
        # Go brings a compiler, C does not: cgo is what packages do without where there is none.
        (("GOCACHE", "/opt/go/cache"), ("GOMODCACHE", "/opt/go/mod"), ("GOFLAGS", "-mod=mod"), ("CGO_ENABLED", "0"),
         ("GOTOOLCHAIN", "local")),
        ("go.mod",))


def _node(files: Mapping[str, str]) -> Recipe:
    try:
        package = json.loads(files["package.json"])
    except ValueError as error:
        raise UserError(f"package.json: is not JSON: {error}") from error
    needed = {**package.get("dependencies", {}), **package.get("devDependencies", {})}
    command = _node_command(package.get("scripts", {}), "test")
    words = _NODE_WRAPPERS.sub("", command).strip()
    install: tuple[str, ...] = ()
    test, parser = words or "node --test", "tap"
    if words.startswith("node --test") or not words:
        test = f"node --test --test-reporter=tap{words.removeprefix('node --test')}"
    elif re.match(r"(?:jest|react-scripts test)\b", words):
        test, parser = f"npx --no-install {words} --verbose --ci", "jest"
    elif re.match(r"(?:_?mocha)\b", words):
        test = f"npx --no-install {re.sub(r' (?:-R|--reporter)[ =][^ ]+', '', words)} --reporter tap"
    elif words.startswith("vitest"):
        words = words if " run" in words else words.replace("vitest", "vitest run", 1)
        test = f"npx --no-install {words} --reporter=tap"
    elif words.startswith(("tape", "tap", "ava")):
        test = f"npx --no-install {words}" + (" --tap" if words.startswith("ava") else "")
    elif not words.startswith("node "):
        test = "npm test"
    packages = ["nodejs", "ca-certificates"]
    if needed:
        packages += ["npm", "git"]
        lock = "package-lock.json" in files or "npm-shrinkwrap.json" in files
        install = ("npm ci --no-audit --no-fund --ignore-scripts" if lock
                   else "npm install --no-audit --no-fund --ignore-scripts --no-package-lock",)
    elif "npm" in test or "npx" in test:
        packages.append("npm")
    return Recipe("javascript", tuple(packages), install, test, parser, (("CI", "true"),), ("package.json",))


def _node_command(scripts: Mapping[str, str], name: str, depth: int = 4) -> str:
    """The command behind a script; of several joined ones the first that runs tests, `npm run x` followed."""
    text = scripts.get(name, "")
    parts = [part.strip() for part in re.split(r"&&|;", text)]
    parts = [part for part in parts if not re.match(r"(?:eslint|standard|prettier|tsc|tsd|xo|lint)\b", part)]
    for part in parts:
        bare = _NODE_WRAPPERS.sub("", part)
        called = re.match(r"(?:npm|yarn|pnpm) (?:run )?([\w:.-]+)", bare)
        if called and called[1] in scripts and depth and not re.search(r"lint|typescript|types|format", called[1]):
            return _node_command(scripts, called[1], depth - 1)
        if not called:
            return part
    return ""


def _python(files: Mapping[str, str], why: Sequence[str]) -> Recipe:
    project = _toml(files.get("pyproject.toml", ""))
    reasons, needed, extras = list(why), [], []
    groups: dict[str, Any] = dict(project.get("project", {}).get("optional-dependencies", {}))
    setup = _ini(files.get("setup.cfg", ""))
    if setup.has_section("options.extras_require"):
        groups |= {name: value for name, value in setup.items("options.extras_require")}
    extras = [name for name in _TEST_GROUPS if name in groups][:1]
    for name in _TEST_GROUPS:
        for entry in project.get("dependency-groups", {}).get(name, []):
            if isinstance(entry, str):
                needed.append(entry)
    poetry = project.get("tool", {}).get("poetry", {})
    for table in (poetry.get("dev-dependencies", {}), *(poetry.get("group", {}).get(name, {}).get("dependencies", {})
                                                       for name in _TEST_GROUPS)):  # fmt: skip
        needed += [name for name in table if name != "python"]
    tox = _ini(files.get("tox.ini", ""))
    if tox.has_option("testenv", "deps"):
        found = [line.strip() for line in tox.get("testenv", "deps").splitlines() if line.strip()]
        # Conditional lines (py37: x) and files (-r x) need tox to be read.
        needed += [line for line in found if re.match(r"[A-Za-z0-9][\w.-]*(?:\[[\w,]+\])?\s*(?:[<>=!~].*)?$", line)]
        reasons.append("tox.ini")
    install = ["python3 -m venv /opt/env"]
    for name in _REQUIREMENTS:
        if name in files:
            install.append(f"{PYTHON} -m pip install -q -r {name}")
            reasons.append(name)
            break
    if "requirements.txt" in files:
        install.append(f"{PYTHON} -m pip install -q -r requirements.txt")
        reasons.append("requirements.txt")
    uses_pytest = _uses_pytest(files)
    needed = [entry for entry in dict.fromkeys(needed) if not _NEVER_NEEDED.match(entry)]
    if uses_pytest and not any(re.match(r"pytest\b(?!-)", entry) for entry in needed):
        needed.insert(0, "pytest")
    if why:
        install.append(f"{PYTHON} -m pip install -q -e {shlex.quote(f'.[{extras[0]}]' if extras else '.')}")
    if needed:
        install.append(f"{PYTHON} -m pip install -q {' '.join(map(shlex.quote, needed))}")
    test = f"{PYTHON} -m pytest -rA -p no:cacheprovider" if uses_pytest else f"{PYTHON} -m unittest discover -v"
    variables = [("PYTHONDONTWRITEBYTECODE", "1")]
    if any(_VERSIONED_BY_GIT.search(files.get(name, "")) for name in ("pyproject.toml", "setup.py", "setup.cfg")):
        variables += [("SETUPTOOLS_SCM_PRETEND_VERSION", "0.0.1"), ("PBR_VERSION", "0.0.1")]
    return Recipe("python", ("python3", "python3-venv", "python3-dev", "ca-certificates", "git"), tuple(install), test,
                  "pytest" if uses_pytest else "unittest", tuple(variables), tuple(dict.fromkeys(reasons)))


def _uses_pytest(files: Mapping[str, str]) -> bool:
    declared = any("pytest" in files.get(name, "") for name in
                   ("pyproject.toml", "setup.cfg", "setup.py", "tox.ini", "pytest.ini", *_REQUIREMENTS))
    tests = [text for path, text in files.items() if re.search(r"(?:^|/)(?:test_[^/]*|[^/]*_test|conftest)\.py$", path)]
    written = any(re.search(r"(?m)^(?:import pytest|from pytest)|^def test_", text) for text in tests)
    return declared or written or not any("unittest" in text for text in tests)


def _toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return {}  # pip will say what is wrong with it


def _ini(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read_string(text)
    except configparser.Error:
        pass
    return parser
