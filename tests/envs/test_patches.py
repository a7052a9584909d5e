"""Patches: git is the reference for what a diff means and whether it applies."""

import random
import shutil
import subprocess

import pytest

from qcn_jax.envs import patches


def _random_text(rng: random.Random) -> str:
    lines = [rng.choice("abcdef\x0c\r") * rng.randint(0, 2) for _ in range(rng.randint(0, 30))]
    return "\n".join(lines) + ("\n" if lines and rng.random() < 0.7 else "")


def _edited(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(lines))
        if rng.random() < 0.5 and len(lines) > 1:
            lines.pop(min(at, len(lines) - 1))
        else:
            lines.insert(at, rng.choice("xyzabc"))
    return "\n".join(lines)


def test_round_trip_and_git_agrees(tmp_path):
    rng = random.Random(0)
    for number in range(60):
        before = _random_text(rng)
        after = _edited(before, rng)
        if before == after:
            continue
        diff = patches.make_diff({"f/x.py": before}, {"f/x.py": after})
        assert patches.apply_diff({"f/x.py": before}, diff) == {"f/x.py": after}
        assert patches.apply_diff({"f/x.py": after}, patches.reverse(diff)) == {"f/x.py": before}
        assert patches.render(patches.parse(diff)) == diff
        if number % 3 == 0:
            file = tmp_path / str(number) / "f" / "x.py"
            file.parent.mkdir(parents=True)
            file.write_text(before, newline="")
            subprocess.run(["git", "apply", "-"], input=diff.encode(), cwd=file.parent.parent, check=True,
                           capture_output=True)
            assert file.read_bytes().decode() == after


def test_reads_what_git_writes(tmp_path):
    def git(*words):
        return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", *words], cwd=tmp_path, check=True,
                              capture_output=True, text=True).stdout

    before = {"keep.py": "".join(f"line {n}\n" for n in range(40)), "gone.py": "x\ny\n", "old name.py": "a\nb\nc\nd\ne\n"}
    after = {"keep.py": before["keep.py"].replace("line 3\n", "LINE 3\n").replace("line 30\n", ""), "new.py": "z",
             "moved.py": "a\nb\nc\nd\nE\n"}
    git("init", "-q")
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    git("add", "-A")
    git("commit", "-qm", "x")
    for name in before:
        (tmp_path / name).unlink()
    for name, text in after.items():
        (tmp_path / name).write_text(text)
    git("add", "-A")
    diff = git("diff", "--cached", "-M")
    assert "rename from" in diff
    assert patches.apply_diff(before, diff) == after
    assert patches.apply_changes(before, diff)["gone.py"] is None
    assert patches.apply_diff(after, patches.reverse(diff)) == before
    assert patches.touched(diff) == ["gone.py", "keep.py", "moved.py", "new.py", "old name.py"]


def test_applies_at_an_offset_but_not_with_other_context():
    diff = patches.make_diff({"a": "1\n2\n3\nold\n4\n5\n6\n"}, {"a": "1\n2\n3\nnew\n4\n5\n6\n"})
    assert patches.apply_diff({"a": "0\n0\n1\n2\n3\nold\n4\n5\n6\n"}, diff) == {"a": "0\n0\n1\n2\n3\nnew\n4\n5\n6\n"}
    with pytest.raises(patches.PatchError, match="hunk 1"):
        patches.apply_diff({"a": "1\n2\nX\nold\n4\n5\n6\n"}, diff)
    with pytest.raises(patches.PatchError, match="no such file"):
        patches.apply_diff({}, diff)
    with pytest.raises(patches.PatchError, match="already exists"):
        patches.apply_diff({"b": "x\n"}, patches.make_diff({}, {"b": "x\n"}))


@pytest.mark.parametrize("diff", [
    "garbage", "--- a/../x\n+++ b/../x\n@@ -1 +1 @@\n-a\n+b\n", "--- /dev/null\n+++ /abs\n@@ -0,0 +1 @@\n+b\n",
    "--- a/x\n+++ b/x\n@@ -1,3 +1 @@\n-a\n", "diff --git a/l b/l\nnew file mode 120000\n--- /dev/null\n+++ b/l\n@@ -0,0 +1 @@\n+t\n",
    "diff --git a/x b/x\nBinary files a/x and b/x differ\n", "--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+" + "b" * 1_000_001 + "\n"])
def test_refused(diff):
    with pytest.raises(patches.PatchError):
        patches.apply_diff({"x": "a\n"}, diff)


SETTINGS = (["-M"], ["-M", "-C", "--find-copies-harder"], ["-c", "diff.mnemonicPrefix=true"], ["--no-prefix"],
            ["-c", "core.quotePath=false"], ["-U0"], ["-U1"], ["--src-prefix=old/", "--dst-prefix=new/"], ["--full-index"])
NAMES = ("plain.py", "with blank.py", "größe.py", "日本/ü b.py", 'quo"te.py', "a/b.py", "b/b.py", "i/x/w.py", "w/w.py")


def _tree(rng: random.Random) -> dict[str, str]:
    """Files of many lines, so that git finds what was moved and copied."""
    return {name: "".join(f"{name} {rng.randint(0, 9)} {line}\n" for line in range(20)) for name in NAMES
            if rng.random() < 0.7}


def _changed(before: dict[str, str], rng: random.Random) -> dict[str, str]:
    after = dict(before)
    for name, text in before.items():
        way, other = rng.choice(("keep", "edit", "delete", "move", "copy", "empty")), f"moved {rng.choice(NAMES)}"
        if way in ("delete", "move"):
            del after[name]
        if way in ("move", "copy") and not any(path.startswith(f"{other}/") for path in after):
            after[other] = text.replace(" 3\n", " three\n") if rng.random() < 0.5 else text
        if way in ("edit", "copy") and rng.random() < 0.7:
            after[name] = _edited(text, rng)
        if way == "empty":
            after["empty.py"] = ""
    return after


def test_reads_what_git_writes_in_all_its_settings(tmp_path):
    """Also names that git quotes, prefixes of every kind, copies, moves, empty files and the last line's end."""
    def write(tree):
        for path in [path for path in tmp_path.iterdir() if path.name != ".git"]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, text in tree.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text, newline="")
        _git(tmp_path, "add", "-A")

    _git(tmp_path, "init", "-q")
    rng, copies = random.Random(1), 0
    for number in range(2 * len(SETTINGS)):
        before = _tree(rng)
        after = _changed(before, rng)
        write(before)
        _git(tmp_path, "commit", "-qm", "x", "--allow-empty")
        write(after)
        first = SETTINGS[number % len(SETTINGS)]
        cut = 2 if first[0] == "-c" else 0
        diff = _git(tmp_path, *first[:cut], "diff", "--cached", *first[cut:])
        copies += diff.count("copy from")
        assert patches.apply_diff(before, diff) == after, (first, diff)
        assert patches.apply_diff(before, patches.render(patches.parse(diff))) == after
        assert patches.apply_diff(before, diff.removesuffix("\n")) == after
    assert copies


def _git(folder, *words, text=None):
    command = ["git", "-c", "user.name=a", "-c", "user.email=b", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, input=text, text=True).stdout


_EDIT = "--- a/x.py\n+++ b/x.py\n@@ -1,4 +1,4 @@\n-one\n+ONE\n two\n \n \n"


@pytest.mark.parametrize("diff", [
    _EDIT, _EDIT.removesuffix("\n"), _EDIT.strip(), _EDIT.replace("\n \n \n", "\n\n\n"), _EDIT.replace("\n", "\r\n"),
    _EDIT.replace("a/x.py", "x.py.orig").replace("b/x.py", "x.py"), "a word before\n\n" + _EDIT + "-- \n2.39.5\n",
    _EDIT.replace("a/", "i/").replace("b/", "w/"), "diff --git a/x.py b/x.py\nindex 1..2 100644\n" + _EDIT,
    _EDIT.replace("a/x.py", "a/x.py\t2026-01-01 00:00:00").replace("b/x.py", "b/x.py\t2026-01-01 00:00:01")])
def test_accepts_what_swebench_accepts(tmp_path, diff):
    """SWE-bench tries `git apply`, then GNU patch: what one of them applies is applied, to the same effect."""
    (tmp_path / "x.py").write_text("one\ntwo\n\n\nthree\n")
    before = {"x.py": (tmp_path / "x.py").read_text()}
    ways = (["git", "apply", "-"], ["patch", "--batch", "--forward", "--fuzz=5", f"-p{int('.orig' not in diff)}"])
    assert any(subprocess.run(way, cwd=tmp_path, input=diff, text=True, capture_output=True).returncode == 0 for way in ways)
    assert patches.apply_diff(before, diff) == {"x.py": (tmp_path / "x.py").read_text()} != before


def test_what_is_no_text_is_left_out_and_named(tmp_path):
    """Binary files, links and submodules stand beside a fix where an agent ran the code; the fix is still one."""
    (tmp_path / "x.py").write_text("one\n")
    (tmp_path / "old.png").write_bytes(b"\0\1")
    (tmp_path / "link").symlink_to("x.py")
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "add", "-A")
    _git(tmp_path, "commit", "-qm", "x")
    (tmp_path / "x.py").write_text("ONE\n")
    (tmp_path / "old.png").write_bytes(b"\0\2")
    (tmp_path / "new ü.png").write_bytes(b"\0\3")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("y.py")
    (tmp_path / "venv").symlink_to("/usr")
    _git(tmp_path, "add", "-A")
    binary = dict.fromkeys(("old.png", "new ü.png"), "is binary") | dict.fromkeys(("link", "venv"), "is no regular file")
    for words in ([], ["--binary"]):
        diff, found = _git(tmp_path, "diff", "--cached", *words), {}
        assert patches.apply_changes({"x.py": "one\n"}, patches.parse(diff, found)) == {"x.py": "ONE\n"}
        assert found == binary
        with pytest.raises(patches.PatchError, match="not allowed"):
            patches.parse(diff)
    plain, found = "Binary files a/z.png and b/z.png differ\n--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-one\n+ONE\n", {}
    assert patches.apply_changes({"x.py": "one\n"}, patches.parse(plain, found)) == {"x.py": "ONE\n"}
    assert found == {"z.png": "is binary"}


def test_moves_and_copies_take_the_files_as_they_were():
    before = {"a.py": "a\n", "b.py": "b\n"}
    swap = "".join(f"diff --git a/{old} b/{new}\nsimilarity index 100%\nrename from {old}\nrename to {new}\n"
                   for old, new in (("a.py", "b.py"), ("b.py", "a.py")))
    assert patches.apply_diff(before, swap) == {"a.py": "b\n", "b.py": "a\n"}
    copy = ("diff --git a/a.py b/a.py\n--- a/a.py\n+++ b/a.py\n@@ -1 +1 @@\n-a\n+A\n"
            "diff --git a/a.py b/c.py\nsimilarity index 100%\ncopy from a.py\ncopy to c.py\n")
    assert patches.apply_diff(before, copy) == {"a.py": "A\n", "b.py": "b\n", "c.py": "a\n"}
    assert patches.touched(copy) == ["a.py", "c.py"]
    with pytest.raises(patches.PatchError, match="c.py: a copy cannot be reversed"):
        patches.reverse(copy)
    with pytest.raises(patches.PatchError, match="b.py: already exists"):
        patches.apply_diff(before, swap.split("diff --git a/b.py")[0])


def test_diff_is_minimal_and_quick_on_long_files():
    lines = [f"value_{number % 7} = {number}\n" for number in range(20_000)]
    changed = list(lines)
    changed[10_000] = "other\n"
    diff = patches.make_diff({"long.py": "".join(lines)}, {"long.py": "".join(changed)})
    assert diff.count("\n") == 3 + 1 + 8  # header, hunk line, three lines of context each way, one out and one in
    assert patches.make_diff({"a": "same"}, {"a": "same"}) == ""
