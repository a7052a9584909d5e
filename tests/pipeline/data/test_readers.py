"""Texts read from files of every kind, filtered and kept; what is malformed is named by file, line and reason."""

import gzip
import io
import json
import tarfile
import zipfile

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from qcn_jax.config import FilterConfig, MidtrainConfig, RunConfig, TextSource
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data import filters
from qcn_jax.pipeline.data.readers import rows
from qcn_jax.pipeline.data.readers.files import FILES
from qcn_jax.pipeline.data.texts import Findings, Text, TextStore

ROWS = [{"text": f"text number {i}\n", "repo": f"r{i % 2}", "path": f"{i}.c", "license": ["MIT"]} for i in range(5)]
FIELD = "--config.midtrain.sources.code"


def lines(values=ROWS):
    return "".join(json.dumps(row) + "\n" for row in values).encode()


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def table(values=ROWS):
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(values), sink, row_group_size=2)
    return sink.getvalue()


def archive(files, kind):
    sink = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(sink, "w") as opened:
            for name, data in files.items():
                opened.writestr(name, data)
    else:
        with tarfile.open(fileobj=sink, mode="w:gz") as opened:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                opened.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def read(path, malformed="stop", check=True, **settings):
    source, findings = TextSource(path=str(path), **settings), Findings(malformed)
    if check:
        FILES.check(RunConfig(midtrain=MidtrainConfig(malformed=malformed)), source, FIELD)
    return list(FILES.read(None, source, findings)), findings


@pytest.mark.parametrize("name, data", [
    ("a.jsonl", lines()), ("a.json", lines()), ("a.jsonl.gz", gzip.compress(lines())), ("a.jsonl.zst", zstd(lines())),
    ("a.json.gz", gzip.compress(lines()[:99]) + gzip.compress(lines()[99:])), ("a.parquet", table()),
    ("a.jsonl", lines() + b"\n\n"), ("a.jsonl", lines().rstrip(b"\n")), ("a.jsonl", b"\xef\xbb\xbf" + lines()),
])  # fmt: skip
def test_rows_are_read_alike_from_every_format(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    found, findings = read(tmp_path / name)
    assert [(text.text, text.path, text.repo, text.licence) for text in found] == [
        (row["text"], row["path"], row["repo"], "MIT") for row in ROWS]
    assert found[2].place == f"{tmp_path / name}:3" and findings.read == 5
    assert read(tmp_path / "*")[0] == found
    if name != "a.json":  # a folder of nothing else may be a repository's
        assert read(tmp_path)[0] == found


@pytest.mark.parametrize("line", [
    '{"a": "x", "b": 1, "c": null, "d": true}', '{"a": 123456789012345678901234567890}', '{"a": {"id": 18446744073709551617}}',
    '{"a": 0.1, "b": 1e999}', '{"a": "\\ud800"}', '\ufeff{"a": 1}', '{"a": 1, "a": 2}', '{"a": -0.0}', '{"a": [NaN]}',
    '{"a": 9223372036854775808}', '{"a": "\\u0000 \u2028"}'])
def test_rows_are_what_the_standard_library_reads(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line + "\n", encoding="utf-8")
    ((_, row),) = rows.read_rows(tmp_path / "a.jsonl", Findings("stop", ""))
    assert repr(row) == repr(json.loads(line.removeprefix("\ufeff")))


def test_columns_are_named_by_options_and_megabytes_end_the_reading(tmp_path):
    values = [{"body": "x" * 1000, "text": "no", "lang": "C"}] * 9
    (tmp_path / "b.parquet").write_bytes(table(values))
    (tmp_path / "a.jsonl").write_bytes(lines(values))
    found, _ = read(tmp_path / "*", options={"text": "body"}, megabytes=0.0095)
    assert [text.language for text in found] == ["C"] * 10 and {text.text for text in found} == {"x" * 1000}
    assert found[0].place.startswith(f"{tmp_path}/a.jsonl")
    with pytest.raises(UserError, match="sources.code.options.txt: unknown key; allowed: language, licence"):
        read(tmp_path, options={"txt": "body"})


def test_folders_clones_and_archives_are_repositories(tmp_path):
    files = {"pkg/a.py": b"import b\r\n", "pkg/b.go": b"package b\n", "logo.png": b"\x89PNG\x00", "blank.txt": b" \n",
             ".git/config": b"[core]\n", "node_modules/x.js": b"x\n", "big.csv": b"1,2\n" * 300_000}
    for path, data in files.items():
        (tmp_path / "clones/one" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clones/one" / path).write_bytes(data)
    (tmp_path / "clones/one/secret").symlink_to("/etc/passwd")
    want = [("pkg/a.py", "import b\n", "one"), ("pkg/b.go", "package b\n", "one")]
    for path in (tmp_path / "clones/one", tmp_path / "clones"):
        found, findings = read(path)
        assert [(text.path, text.text, text.repo) for text in found] == want
        assert findings.left_out == {"files over 1 MiB": 1, "not text": 1, "empty": 1} and findings.read == 5
    packed = {f"one/{path}": data for path, data in files.items()}
    for name, kind in (("one.tar.gz", "tar"), ("one.zip", "zip")):
        (tmp_path / name).write_bytes(archive(packed, kind))
        found, _ = read(tmp_path / name)
        assert [(text.path, text.text, text.repo) for text in found] == want


DEEP = b'{"text": ' + b"[" * 100_000 + b"\n"
MALFORMED = [
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl:2: is not valid JSON"),
    ("a.jsonl", b'{"text": "a"}\n[1]\n', "a.jsonl:2: expected a JSON object, got list"),
    ("a.jsonl", b'{"text": "a"}\n"b"\n', "a.jsonl:2: expected a JSON object, got str"),
    ("a.jsonl", b'{"text": "a"}\nnull\n', "a.jsonl:2: expected a JSON object, got NoneType"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl:2: is not UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n' + DEEP, "a.jsonl:2: is not valid JSON"),
    ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "a.jsonl:2: its text is int, expected text"),
    ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', "a.jsonl:2: its text is null, expected text"),
    ("a.jsonl", b'{"text": "a"}\n{"txt": "b", "n": 1}\n', "a.jsonl:2: has no column text or content, only txt, n"),
    ("a.jsonl", b'{"text": "a"}\n{}\n', "a.jsonl:2: has no column text or content, only an empty object"),
    ("a.jsonl", b'{"text": "a"}\n' + b" " * 3000 + b'"long"\n', "a.jsonl:2: is longer than 0 MiB"),
    ("a.json", b'[\n {"text": "a"},\n {"text": "b"}\n]\n', "a.json:1: is not valid JSON: .* give a row a line instead"),
    ("a.jsonl.gz", gzip.compress(lines(ROWS * 400))[:-30], "a.jsonl.gz:[0-9]+: cannot be read on: "),
    ("a.jsonl.gz", b"no gzip at all", "a.jsonl.gz:1: cannot be read on: Not a gzipped file"),
    ("a.jsonl.zst", b"no zstd at all", "a.jsonl.zst:1: cannot be read on: "),
    ("a.jsonl.zst", zstd(lines(ROWS * 400))[:-30], "a.jsonl.zst:[0-9]+: cannot be read on: "),
    ("a.parquet", b"no parquet", "a.parquet:1: cannot be read as Parquet: "),
    ("a.parquet", table()[:-9], "a.parquet:1: cannot be read as Parquet: "),
    ("a.parquet", table([{"txt": "a", "n": 1}]), "a.parquet:1: has no column text or content, only txt, n"),
    ("a.parquet", table([{"text": "a"}, {"text": None}]), "a.parquet:2: its text is null, expected text"),
    ("a.parquet", table([{"text": 1}]), "a.parquet:1: its text is int, expected text"),
    ("a.tar.gz", b"no archive", "a.tar.gz: cannot be read as an archive: "),
    ("a.tar.gz", archive({"one/a.py": np.random.default_rng(0).bytes(9999)}, "tar")[:-900], "a.tar.gz: cannot be read as"),
    ("a.zip", b"no archive", "a.zip: cannot be read as an archive: "),
]  # fmt: skip


@pytest.mark.parametrize("name, data, line", MALFORMED)
def test_what_is_malformed_stops_by_file_line_and_reason_or_is_skipped_and_counted(tmp_path, name, data, line, monkeypatch):
    monkeypatch.setattr(rows, "MAX_LINE", 2000 if b"long" in data else 1 << 20)
    (tmp_path / name).write_bytes(data)
    (tmp_path / "b.jsonl").write_bytes(lines())
    with pytest.raises(UserError, match=line) as caught:
        read(tmp_path / "*", check=False)
    assert "\n" not in str(caught.value) and str(caught.value).endswith("midtrain.malformed=skip leaves such rows out")
    found, findings = read(tmp_path / "*", "skip")
    assert [text.text for text in found[-5:]] == [row["text"] for row in ROWS] and findings.malformed > 0
    summary = findings.summary()
    assert summary["malformed_rows"][0] in str(caught.value) and json.loads(json.dumps(summary)) == summary


@pytest.mark.parametrize("path, data, line", [
    ("", None, "--config.midtrain.sources.code.path: is empty; allowed: a file, a folder or a glob"),
    ("none.jsonl", None, "none.jsonl: there is no such file or folder"),
    ("*.parquet", None, r"\*.parquet: matches no file"),
    ("a.jsonl", b"", "a.jsonl: is empty"),
    ("a.jsonl", b"\n \n", "--config.midtrain.sources.code: holds no text: .*0 of 0 kept"),
    ("a.jsonl", b'{"text": " "}', "holds no text: .*1 left out: empty"),
    ("a.bin", b"x", "a.bin: of an unknown kind; allowed: "),
    ("folder", None, "holds no text: "),
    ("a.zip", archive({}, "zip"), "holds no text: "),
])  # fmt: skip
def test_an_empty_or_missing_source_is_one_line_before_any_work(tmp_path, monkeypatch, path, data, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    if data is not None:
        (tmp_path / path).write_bytes(data)
    with pytest.raises(UserError, match=line) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_store_gives_texts_back_and_groups_them(tmp_path):
    texts = [Text("a\nb", "p", "r1", "C", "MIT"), Text("\ud800 é", repo="r2"), Text("c", repo="r1"), Text("d"), Text("e")]
    store = TextStore.write(tmp_path / "s", iter(texts), lambda: {"read": 7})
    again = TextStore(tmp_path / "s")
    assert list(again) == texts and again.summary["read"] == 7 and again.summary["characters"] == 9
    assert [(name, [text.text for text in group]) for name, group in store.repositories()] == [
        ("r1", ["a\nb", "c"]), ("r2", ["\ud800 é"]), ("", ["d"]), ("", ["e"])]
    (tmp_path / "s/texts.bin").write_bytes(b"cut")
    with pytest.raises(UserError, match="texts.bin: has 3 bytes instead of .*; remove its folder"):
        TextStore(tmp_path / "s")


def left_out(texts, heldout=(), **settings):
    findings = Findings()
    kept = list(filters.filtered(texts, FilterConfig(**settings), heldout, findings))
    assert findings.kept == len(kept)
    return [text.text for text in kept], findings.left_out


HELDOUT = "def slugify_everything(text, delimiter='_'):\n    return delimiter.join(text.lower().split())\n"


def test_filters_leave_out_by_reason():
    texts = [Text("short"), Text("x" * 300), Text("# Code generated by protoc. DO NOT EDIT.\nx = 1\n"),
             Text("licensed text", licence="Apache-2.0, MIT"), Text("other text ", licence="GPL-3.0, MIT"),
             Text("# copied\n" + HELDOUT.replace("    return", "\treturn"))]  # fmt: skip
    every = [text.text for text in texts]
    assert left_out(texts) == (every, {})
    assert left_out(texts, min_characters=6) == (every[1:], {"under 6 characters": 1})
    assert left_out(texts, max_characters=299) == (every[:1] + every[2:], {"over 299 characters": 1})
    assert left_out(texts, max_line=200) == (every[:1] + every[2:], {"lines over 200 characters": 1})
    assert left_out(texts, generated=True) == (every[:2] + every[3:], {"generated": 1})
    assert left_out(texts, licences=("mit", "apache-2.0")) == (every[3:4], {"licence": 5})
    assert left_out(texts, [HELDOUT]) == (every[:5], {"copies of held-out code": 1})


def test_secrets_and_near_duplicates_are_found_by_kept_libraries():
    pytest.importorskip("detect_secrets", reason="not installed: detect-secrets")
    pytest.importorskip("datasketch", reason="not installed: datasketch")
    key = "AKIA" + "IOSFODNN7" + "QXAMPLF"
    texts = [Text("password = read()\n"), Text(f"x = 1\naws = '{key}'\n"), Text("-----BEGIN RSA " + "PRIVATE KEY-----\n")]
    assert left_out(texts, secrets=True) == (["password = read()\n"], {"secrets": 2})
    words = [f"word{i}" for i in range(200)]
    near = Text(" ".join([*words[:100], "other", *words[101:]]))
    far = Text(" ".join(words[::-1]))
    whole = Text(" ".join(words))
    assert left_out([whole, near, far, whole], near_duplicates=0.7) == ([whole.text, far.text], {"near duplicates": 2})


def test_a_filter_without_its_library_is_one_line(monkeypatch):
    monkeypatch.setattr(filters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"filters.secrets: needs detect-secrets; pip install 'qcn_jax\[data\]'"):
        filters.check(FilterConfig(secrets=True), "--config.midtrain.filters")
    filters.check(FilterConfig(), "--config.midtrain.filters")
