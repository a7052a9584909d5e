"""Verbs as an ordinary user, over paths that may not be read, written or entered: one line that names the path."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from qcn_jax import hub
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.cli import main
from qcn_jax.envs.sandbox import repository
from qcn_jax.errors import UserError
from qcn_jax.hub import orbax_folder
from qcn_jax.model import Qwen3Next
from qcn_jax.pipeline.stages.midtrain import ADDED_TOKENS
from tests.pipeline.micro import MODEL
from tests.rights import ordinary_user

TEXTS = {
    "config.py": "from qcn_jax.config import RunConfig, to_config_dict\n"
                 "def get_config():\n    return to_config_dict(RunConfig())\n",
    "tasks.jsonl": '{"repo": "a", "instance_id": "a-1", "base_commit": "0", "patch": "", "test_patch": "", '
                   '"problem_statement": "x", "FAIL_TO_PASS": ["t"], "PASS_TO_PASS": []}\n',
    "preds.jsonl": '{"instance_id": "a-1", "model_name_or_path": "m", "model_patch": ""}\n',
    "flags": "--stages=report\n", "repo/setup.py": "", "repo/pkg/core.py": "", "out/kept": "",
}


@pytest.fixture(scope="module", name="contents")
def _contents(tmp_path_factory):
    """Bytes by path of everything that a verb may be given; every verb has been imported."""
    folder = tmp_path_factory.mktemp("contents")
    params = jax.jit(Qwen3Next(MODEL).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    tokenizer = Tokenizer.train(["def f(): pass\n"], Tokenizer.smallest(ADDED_TOKENS), ADDED_TOKENS)
    hub.save(folder / "model", MODEL, params, tokenizer)
    orbax_folder.save(folder / "orbax", MODEL, params)
    contents = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    contents |= {pathlib.Path(name): text.encode() for name, text in TEXTS.items()}
    _write(folder, contents)
    for arguments in {arguments for arguments, *_ in CASES.values()}:
        if not arguments.startswith("convert"):
            arguments = arguments.replace("D/", "D/none/")  # else it would go to work
        assert main.main(arguments.replace("D/", f"{folder}/").split()) in (0, 1)
    assert main.main(f"{RUN} --stages=tusks".replace("D/", f"{folder}/").split()) == 1
    return contents


def _write(folder, contents):
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


EVALUATE = "evaluate --predictions=D/preds.jsonl --tasks=D/tasks.jsonl --out=D/out/e --repo=D/repo"
SYNTHESIZE = "synthesize --repo=D/repo --out=D/out/t.jsonl --sandbox=local"
RUN = "run --config=D/config.py --workdir=D/out/run --stages=report"
COMPILE = "compile --config=D/config.py --topology=v5p:2x2x1"
GENERATE = "generate --checkpoint=D/model --prompt=x"
READ, WRITE = "cannot be read: Permission denied", "cannot be written: no permission to write into "
# name: command, path, its mode, words of the line
CASES = {
    "checkpoint": (GENERATE, "model", 0, READ), "served": ("serve --checkpoint=D/model", "model", 0, READ),
    "weights": (GENERATE, "model/model.safetensors", 0, READ), "architecture": (GENERATE, "model/config.json", 0, READ),
    "tokenizer": (GENERATE, "model/tokenizer.json", 0, READ),
    "orbax": ("convert --from=D/orbax --to=D/out/c", "orbax", 0, READ),
    "store": ("convert --from=D/orbax --to=D/out/c", "orbax/params", 0, READ),
    "manifest": ("convert --from=D/orbax --to=D/out/c", "orbax/params/manifest.ocdbt", 0, "this user may not read it"),
    "metadata": ("convert --from=D/orbax --to=D/out/c", "orbax/params/_METADATA", 0, "Permission denied"),
    "source": ("convert --from=D/model --to=D/out/c", "model", 0, READ),
    "target": ("convert --from=D/model --to=D/out/c", "out", 0o500, f"--to=D/out/c: {WRITE}"),
    "closed target": ("convert --from=D/model --to=D/out/c", "out", 0, f"--to=D/out/c: {WRITE}"),
    "config": (RUN, "config.py", 0, "--config=D/config.py: cannot be read: no permission to read D/config.py"),
    "workdir": (RUN, "out", 0o500, "--workdir=D/out/run: cannot be written"),
    "closed workdir": (RUN, "out", 0, "--workdir=D/out/run: cannot be written"),
    "flag file": ("run --flagfile=D/flags", "flags", 0, "Permission denied: 'D/flags'"),
    "initial model": (f"{RUN} --stages=midtrain --config.init=D/model", "model", 0, f"D/model/config.json: {READ}"),
    "verified tasks": ("verify --tasks=D/tasks.jsonl", "tasks.jsonl", 0, f"D/tasks.jsonl: {READ}"),
    "tasks": (EVALUATE, "tasks.jsonl", 0, f"D/tasks.jsonl: {READ}"),
    "predictions": (EVALUATE, "preds.jsonl", 0, f"D/preds.jsonl: {READ}"),
    "report": (EVALUATE, "out", 0o500, f"--out=D/out/e: {WRITE}"),
    "repository": (SYNTHESIZE, "repo", 0, READ), "new tasks": (SYNTHESIZE, "out", 0o500, f"--out=D/out/t.jsonl: {WRITE}"),
    "compiled": (f"{COMPILE} --out=D/out/c.json", "out", 0o500, f"--out=D/out/c.json: {WRITE}"),
    "dump": (f"{COMPILE} --dump=D/out/new/c.txt", "out", 0o500, f"--dump=D/out/new/c.txt: {WRITE}"),
    "compiled config": (COMPILE, "config.py", 0, "--config=D/config.py: cannot be read"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_names_the_path(contents, case, capsys):
    arguments, path, mode, words = CASES[case]
    with ordinary_user() as folder:
        _write(folder, contents)
        (folder / path).chmod(mode)
        before = sorted(folder.rglob("*"))
        capsys.readouterr()
        status = main.main(arguments.replace("D/", f"{folder}/").split())
        lines = capsys.readouterr().err.strip().splitlines()
        assert sorted(folder.rglob("*")) == before
    assert status == 1 and len(lines) == 1, lines
    assert words.replace("D/", f"{folder}/") in lines[0] and f"{folder}/{path}".rstrip("/") in lines[0], lines


@pytest.mark.parametrize("path", ["repo/pkg/core.py", "repo/pkg"])
def test_an_unreadable_part_of_a_repository_is_not_left_out(contents, path):
    with ordinary_user() as folder:
        _write(folder, contents)
        (folder / path).chmod(0)
        with pytest.raises(UserError, match=f"{folder / path}: cannot be read: Permission denied"):
            repository.unpack(repository.RepositorySpec("repo", str(folder / "repo")))


def test_what_the_machine_refuses_is_one_line_wherever_it_is_met(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")

    def verb(arguments):
        (tmp_path / "file" / "x").stat()

    monkeypatch.setattr("qcn_jax.cli.doctor.main", verb)
    assert main.main(["doctor"]) == 1
    assert capsys.readouterr().err == f"qcn doctor: {tmp_path}/file/x: Not a directory\n"
    monkeypatch.setattr("qcn_jax.cli.doctor.main", lambda arguments: open(tmp_path / "none", encoding="utf-8"))
    with pytest.raises(FileNotFoundError):  # whose fault that is, a traceback tells best
        main.main(["doctor"])
