"""Which way imports run: docs/design.md's rules, read off every import in the package, those inside functions too."""

import ast
import functools
import pathlib

import pytest

import qcn_jax

ROOT = pathlib.Path(qcn_jax.__file__).parent


@functools.cache
def imports() -> dict[str, frozenset[str]]:
    """Modules of the package that each module imports, packages on the way to them included; and names from outside."""
    modules = {".".join(("qcn_jax", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
               for path in ROOT.rglob("*.py")}
    found = {}
    for name, path in modules.items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: imports are absolute"
                targets |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in modules else node.module
                            for alias in node.names}
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
        if not path.match("**/inside/*.py"):  # these run elsewhere
            found[name] = frozenset(targets)
    return found


def within(name: str, *rooms: str) -> bool:
    """Whether a module is one of `rooms` or in one, each given without the package's name."""
    return any(name == f"qcn_jax.{room}" or name.startswith(f"qcn_jax.{room}.") for room in rooms)


def offences(room: str, *forbidden: str, but: tuple[str, ...] = ()) -> list[str]:
    """Imports from `room` into `forbidden` rooms."""
    return [f"{name} imports {target}" for name, targets in imports().items() if within(name, room)
            for target in targets if within(target, *forbidden) and not within(target, *but)]


BASE = ("agents", "chat", "cli", "compile", "envs", "hub", "inference", "pipeline", "recipes", "testing")


@pytest.mark.parametrize("room, forbidden", [
    ("layers", (*BASE, "moe", "model", "decoder")),
    ("sharding", (*BASE, "layers", "moe", "model", "decoder")),
    ("moe", (*BASE, "model", "decoder")),
    ("decoder", BASE), ("model", BASE),
    ("chat", tuple(room for room in BASE if room != "chat")),
    ("envs", ("agents", "cli", "compile", "hub", "inference", "pipeline", "recipes", "testing", "model", "layers", "moe")),
    ("agents", ("cli", "compile", "hub", "inference", "pipeline", "recipes", "testing", "model", "layers", "moe")),
    ("hub", ("agents", "cli", "compile", "envs", "inference", "pipeline", "recipes", "testing")),
    ("inference", ("agents", "cli", "compile", "envs", "pipeline", "recipes", "testing")),
    ("pipeline", ("cli", "compile", "recipes", "testing")),
    ("pipeline.rl", ("pipeline.experts", "pipeline.stages", "pipeline.evaluate", "pipeline.report")),
    ("pipeline.train", ("pipeline.experts", "pipeline.stages", "pipeline.rl", "pipeline.evaluate", "pipeline.report")),
    ("pipeline.data", ("pipeline.experts", "pipeline.stages", "pipeline.rl", "pipeline.train")),
    ("compile", ("cli", "recipes", "testing")),
    ("recipes", ("cli", "compile", "testing")),
    ("config", BASE), ("registry", BASE), ("files", BASE), ("journal", BASE), ("memo", BASE),
])  # fmt: skip
def test_no_import_runs_back(room, forbidden):
    if room == "pipeline.data":  # for annotations alone
        found = [line for line in offences(room, *forbidden) if "context" not in line]
    else:
        found = offences(room, *forbidden)
    assert not found, "\n".join(found)


def test_nothing_imports_recipes_or_testing_but_they_themselves():
    for room in ("recipes", "testing"):
        found = [f"{name} imports {target}" for name, targets in imports().items() if not within(name, room)
                 for target in targets if within(target, room)]
        assert not found, "\n".join(found)


def test_agents_chat_and_environments_come_without_jax():
    """Transitively: nothing that they import, at whatever depth, imports JAX or Flax when it is loaded."""
    @functools.cache
    def loaded(name: str) -> set[str]:
        """What a module imports when it is loaded, and not only when a function of it runs."""
        path = ROOT.joinpath(*name.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        targets, nodes = set(), list(ast.parse(path.read_text()).body)
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                continue
            if isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
                nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            if isinstance(node, ast.ImportFrom):
                targets |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in imports() else node.module
                            for alias in node.names}
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
        return targets

    for start in (name for name in imports() if within(name, "agents", "chat", "envs")):
        seen, stack = set(), [start]
        while stack:
            name = stack.pop()
            for target in loaded(name) - seen:
                assert target.split(".")[0] not in ("jax", "flax", "optax", "orbax"), f"{start}, by way of {name}"
                seen.add(target)
                if target in imports():
                    stack.append(target)


def test_text_is_parsed_where_other_threads_may_parse():
    """By qcn_jax.syntax; what runs inside of sandboxes has nothing but the standard library, and one thread."""
    found = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if "ast.parse(" in path.read_text()
             and "inside" not in path.parts]
    assert found == ["syntax.py"]


def test_files_stay_readable():
    long = {str(path.relative_to(ROOT)): count for path in ROOT.rglob("*.py")
            if (count := path.read_text().count("\n")) > 420}
    assert not long, long
