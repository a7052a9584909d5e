"""The form of repository documents, and what is read of a repository."""

import pathlib

import numpy as np
import pytest

from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.envs.sandbox.base import RepositorySpec
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data.documents import repository

ADDED = ("<|endoftext|>", "<|repo_name|>", "<|file_sep|>")
SOURCE = {
    "app/__init__.py": "",
    "app/main.py": "from app import helpers\nfrom .core import run\n\n\nrun(helpers.VALUE)\n",
    "app/core.py": "import os\nfrom . import zeta\n\n\ndef run(x):\n    return zeta.f(x)\n",
    "app/zeta.py": "def f(x):\n    return x + 1\n",
    "app/helpers.py": "from app.main import run  # a circle\nVALUE = 3\n",
}


@pytest.fixture(name="tokenizer", scope="module")
def _tokenizer():
    return Tokenizer.train([text for text in SOURCE.values()] * 3, 256 + 20 + len(ADDED), ADDED)


def _write(folder, texts):
    for path, text in texts.items():
        target = pathlib.Path(folder, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return RepositorySpec(name="app==1.0", archive=str(folder))


def test_a_repository_is_read_without_vendored_and_broken_files(tmp_path):
    spec = _write(tmp_path, SOURCE | {"app/_vendor/boltons.py": "x = 1\n", "docs/a.txt": "no", "README.md": "no"})
    (tmp_path / "latin.py").write_bytes(b"# \xe9\xff\n")
    assert [path for path, _ in repository.repository_modules(spec)] == [
        "app/core.py", "app/helpers.py", "app/main.py", "app/zeta.py"]


def test_imported_files_come_before_importers_and_circles_end():
    order = [path for path, _ in repository.dependency_order(sorted(SOURCE.items()))]
    assert sorted(order) == sorted(SOURCE)
    assert order.index("app/zeta.py") < order.index("app/core.py") < order.index("app/main.py")
    assert order == [path for path, _ in repository.dependency_order(sorted(SOURCE.items(), reverse=True))]


def test_chains_longer_than_the_stack():
    chain = [(f"m{i:05}.py", f"import m{i + 1:05}\n") for i in range(3000)]
    assert [path for path, _ in repository.dependency_order(chain)][0] == "m02999.py"


def test_a_document_reads_back_as_the_repository(tokenizer):
    modules = [item for item in SOURCE.items() if item[1]]
    documents = list(repository.RepositoryDocuments(tokenizer, 4096).documents("app", modules))
    assert len(documents) == 1
    text = tokenizer.decode(documents[0]["tokens"])
    expected = "".join(f"<|file_sep|>{path}\n{source}" for path, source in repository.dependency_order(modules))
    assert text == "<|repo_name|>app\n" + expected + "<|endoftext|>"
    assert documents[0]["weights"][-1] == 0 and np.all(documents[0]["weights"][:-1] == 1)


def test_long_repositories_are_divided_under_the_same_heading(tokenizer):
    modules = [(f"m{i}.py", "".join(f"value_{i}_{j} = {j}\n" for j in range(25))) for i in range(4)]
    whole = sum(len(tokenizer.encode_ordinary(text)) for _, text in modules)
    documents = list(repository.RepositoryDocuments(tokenizer, 256).documents("app", modules))
    assert len(documents) > 2 and all(len(document["tokens"]) <= 256 for document in documents)
    texts = [tokenizer.decode(document["tokens"]) for document in documents]
    assert all(text.startswith("<|repo_name|>app\n<|file_sep|>m") for text in texts)
    assert [text.endswith("<|endoftext|>") for text in texts] == [False] * (len(texts) - 1) + [True]
    # Each source token is predicted in exactly one of them.
    added = sum(len(tokenizer.encode_ordinary(path + "\n")) + 1 for path, _ in modules)
    heading = len(tokenizer.encode_ordinary("app\n"))  # the name; its marker is given
    assert sum(int(document["weights"].sum()) for document in documents) == whole + added + heading + 1


def test_repeated_blocks_are_masked_once_seen(tokenizer):
    block = "".join(f"configuration_value_{i} = compute_something({i})\n" for i in range(8))
    unique = "completely_different_statement = other_call(1)\n"
    reader = repository.RepositoryDocuments(tokenizer, 8192)
    first, = reader.documents("a", [("a.py", block)])
    second, = reader.documents("b", [("b.py", unique + block)])
    assert np.all(first["weights"][:-1] == 1)
    masked = tokenizer.decode(second["tokens"][1:][second["weights"][:-1] == 0])
    assert masked == block
    assert reader.masked == len(tokenizer.encode_ordinary(block))


def test_too_short_a_row_is_one_line(tokenizer):
    with pytest.raises(UserError, match="at least 64"):
        repository.RepositoryDocuments(tokenizer, 10)
