"""Draws the package's rooms and the imports between them at two commits, side by side, and counts both.

  python benchmarks/structure.py --before=396fadd --after=HEAD

Reads the source of both commits with git and every import in it (inside functions too) with Python's ast; runs none of
it. Writes benchmarks/results/structure.svg and structure.md: rooms (folders of qcn_jax), arrows (a room imports
another), pairs of rooms that import each other, lines, and for ten kinds of change the files that name the thing
changed. An arrow that is drawn in red has one that runs back.
"""

import ast
import collections
import dataclasses
import math
import pathlib
import re
import subprocess

from absl import app, flags

from qcn_jax import files

BEFORE = flags.DEFINE_string("before", "396fadd", "Commit to compare with.")
AFTER = flags.DEFINE_string("after", "HEAD", "Commit to show.")
ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# Ten changes, and what a file names that has to be touched for one more of the kind: an existing member of the kind.
CHANGES = {
    "an expert": r"[\"'](swe|single_turn|(tool_)?format)[\"']|expert_(swe|single_turn|(tool_)?format)",
    "a scaffold": r"\bMINI_SWE_AGENT\b|\bQWEN_CODE\b|[\"']qwen_code[\"']",
    "a tool-call template": r"[\"'](toolace|hermes)[\"']",
    "a bug kind": r"[\"']flip_membership[\"']",
    "a log parser": r"[\"'](mocha|tap)[\"']",
    "a sandbox": r"\bLocalProvider\b",
    "a mesh axis": r"[\"']context[\"']",
    "a chip": r"[\"']v6e[\"']",
    "a packing": r"[\"']restart_last[\"']",
    "a stage": r"[\"']distill[\"']",
}


@dataclasses.dataclass
class Tree:
    """A commit's package: lines and names by file, and imports between rooms with the number of imports."""

    commit: str
    sources: dict[str, str]
    arrows: dict[tuple[str, str], int]

    @property
    def rooms(self) -> dict[str, list[str]]:
        """Files by room."""
        found = collections.defaultdict(list)
        for path in self.sources:
            found[room(path)].append(path)
        return dict(sorted(found.items()))

    @property
    def lines(self) -> int:
        """Lines of all Python files of the package."""
        return sum(text.count("\n") for text in self.sources.values())

    @property
    def mutual(self) -> list[tuple[str, str]]:
        """Pairs of rooms that import each other."""
        return sorted((a, b) for a, b in self.arrows if a < b and (b, a) in self.arrows)


def room(path: str) -> str:
    """The folder that a file belongs to, at most two deep; of files at the top, the model is a room and the rest one."""
    *folders, name = path.split("/")[1:]
    if not folders:
        return "model" if name in ("model.py", "decoder.py") else "base"
    return "/".join(folders[:2] if folders[0] in ("pipeline", "envs", "recipes") else folders[:1])


def read(commit: str) -> Tree:
    """The package at `commit`."""
    git = lambda *arguments: subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    listed = git("ls-tree", "-r", "--name-only", commit, "qcn_jax").split()
    doors = ("qcn_jax/__init__.py", "qcn_jax/__main__.py")  # they name what is inside, lazily
    paths = [path for path in listed if path.endswith(".py") and path not in doors]
    sources = {path: git("show", f"{commit}:{path}") for path in paths}
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in paths}
    arrows: collections.Counter = collections.Counter()
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                target = modules.get(name) or modules.get(name.rpartition(".")[0])
                if target is not None and room(target) != room(path):
                    arrows[room(path), room(target)] += 1
    return Tree(commit, sources, dict(arrows))


def draw(trees: list[Tree]) -> str:
    """Both trees as SVG: rooms on a circle, sized by lines; arrows by number of imports."""
    width, size = 820, 820
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width * len(trees)} {size}" '
             'font-family="sans-serif" font-size="12">',
             '<defs><marker id="a" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
             '<path d="M0 0L8 4L0 8z" fill="context-stroke"/></marker></defs>']
    for number, tree in enumerate(trees):
        rooms = tree.rooms
        place = {}
        for index, name in enumerate(rooms):
            angle = 2 * math.pi * index / len(rooms) - math.pi / 2
            place[name] = (number * width + width / 2 + 310 * math.cos(angle), size / 2 + 20 + 310 * math.sin(angle))
        parts.append(f'<text x="{number * width + 20}" y="24" font-size="16">{tree.commit}: {len(rooms)} rooms, '
                     f'{len(tree.arrows)} arrows, {len(tree.mutual)} pairs that import each other</text>')
        for (a, b), count in sorted(tree.arrows.items()):
            back = (b, a) in tree.arrows
            (x1, y1), (x2, y2) = place[a], place[b]
            shrink = 1 - 26 / math.hypot(x2 - x1, y2 - y1)
            parts.append(f'<line x1="{x1:.0f}" y1="{y1:.0f}" x2="{x1 + (x2 - x1) * shrink:.0f}" '
                         f'y2="{y1 + (y2 - y1) * shrink:.0f}" stroke="{"#c0392b" if back else "#8a99a8"}" '
                         f'stroke-width="{0.6 + math.log2(count) / 2:.1f}" opacity="0.75" marker-end="url(#a)"/>')
        for name, (x, y) in place.items():
            lines = sum(tree.sources[path].count("\n") for path in rooms[name])
            parts.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="{6 + math.sqrt(lines) / 5:.0f}" fill="#2c6fbb"/>'
                         f'<text x="{x:.0f}" y="{y - 12 - math.sqrt(lines) / 5:.0f}" text-anchor="middle">{name} '
                         f'({len(rooms[name])})</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def table(trees: list[Tree]) -> str:
    """Both trees in numbers, as Markdown."""
    rows = [
        ("lines of Python in qcn_jax", *(f"{tree.lines:,}" for tree in trees)),
        ("files", *(len(tree.sources) for tree in trees)),
        ("rooms", *(len(tree.rooms) for tree in trees)),
        ("most files in one room", *(max(map(len, tree.rooms.values())) for tree in trees)),
        ("file names that occur twice", *(
            sum(count > 1 for name, count in collections.Counter(
                pathlib.PurePath(path).name for path in tree.sources).items() if name != "__init__.py")
            for tree in trees)),
        ("arrows between rooms", *(len(tree.arrows) for tree in trees)),
        ("pairs of rooms that import each other", *(
            f"{len(tree.mutual)}: " + ", ".join(" and ".join(pair) for pair in tree.mutual) if tree.mutual else "0"
            for tree in trees)),
    ]
    for change, pattern in CHANGES.items():
        rows.append((f"files that name members of the kind: {change}", *(
            sum(bool(re.search(pattern, text)) for text in tree.sources.values()) for tree in trees)))
    head = ["what", *(f"`{tree.commit}`" for tree in trees)]
    lines = [head, ["---"] * len(head), *rows]
    return "# The house before and after\n\nBy `benchmarks/structure.py`; drawn in [structure.svg](structure.svg).\n\n" + "".join(
        "| " + " | ".join(map(str, row)) + " |\n" for row in lines)


def main(_: list[str]) -> None:
    trees = [read(BEFORE.value), read(AFTER.value)]
    files.write_text(RESULTS / "structure.svg", draw(trees))
    files.write_text(RESULTS / "structure.md", table(trees))
    print(table(trees))


if __name__ == "__main__":
    app.run(main)
