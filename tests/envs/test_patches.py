"""Patches: git is the reference for what a diff means and whether it applies."""

import random
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


def test_diff_is_minimal_and_quick_on_long_files():
    lines = [f"value_{number % 7} = {number}\n" for number in range(20_000)]
    changed = list(lines)
    changed[10_000] = "other\n"
    diff = patches.make_diff({"long.py": "".join(lines)}, {"long.py": "".join(changed)})
    assert diff.count("\n") == 3 + 1 + 8  # header, hunk line, three lines of context each way, one out and one in
    assert patches.make_diff({"a": "same"}, {"a": "same"}) == ""
