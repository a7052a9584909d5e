"""The command line from outside: exit status, one line on stderr, lazy imports."""

import importlib
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from qcn_jax.cli import main as cli
from qcn_jax.errors import UserError


def _qcn(*arguments, **kwargs):
    return subprocess.run([sys.executable, "-m", "qcn_jax", *arguments], capture_output=True, text=True,
                          timeout=120, check=False, **kwargs)


def _fake_verb(monkeypatch, tmp_path, body):
    """Installs a verb called `fake` whose main(argv) has `body`."""
    source = "def main(argv):\n" + textwrap.indent(textwrap.dedent(body), "    ")
    (tmp_path / "fake_verb_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.VERBS, "fake", ("fake_verb_module", "a verb of this test"))
    sys.modules.pop("fake_verb_module", None)
    importlib.invalidate_caches()


def test_overview_lists_every_verb_that_exists_and_nothing_else():
    done = _qcn("--help")
    assert done.returncode == 0 and done.stderr == ""
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")}
    assert listed == set(cli.available_verbs())
    assert {"run", "evaluate", "doctor"} <= listed


def test_no_verb_is_an_error_and_shows_the_overview():
    done = _qcn()
    assert done.returncode == 1 and "usage: qcn VERB" in done.stdout


@pytest.mark.parametrize("arguments, words", [
    (["fly"], ["unknown verb 'fly'", "run"]),
    (["run", "--wat=1"], ["--wat", "--workdir"]),
    (["run"], ["--workdir is required"]),
    (["run", "--workdir=w"], ["--config is required"]),
    (["run", "stray", "--workdir=w"], ["'stray'"]),
    (["run", "--workdir=w", "--config=no_such.py"], ["--config=no_such.py", "no file"]),
])
def test_bad_command_lines_give_one_line(arguments, words, tmp_path):
    done = _qcn(*arguments, cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", cli.available_verbs())
def test_every_verb_explains_itself(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"qcn {verb}" in text and "Flags:" in text and len(text) > 200


def test_help_imports_neither_jax_nor_absl():
    code = ("import sys; from qcn_jax.cli.main import main; main(['--help']); "
            "print([m for m in ('jax', 'absl', 'flax', 'docker') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout.strip().endswith("[]")


def test_user_error_is_one_line_even_with_newlines_inside(monkeypatch, tmp_path, capsys):
    _fake_verb(monkeypatch, tmp_path, """
        from qcn_jax.errors import UserError
        raise UserError("--a: first\\nsecond")
    """)
    assert cli.main(["fake"]) == 1
    assert capsys.readouterr().err == "qcn fake: --a: first second\n"


def test_defects_keep_their_traceback(monkeypatch, tmp_path):
    _fake_verb(monkeypatch, tmp_path, "raise KeyError('defect')")
    with pytest.raises(KeyError):
        cli.main(["fake"])


def test_full_disk_is_one_line_that_names_the_file(monkeypatch, tmp_path, capsys):
    _fake_verb(monkeypatch, tmp_path, """
        with open('/dev/full', 'w') as stream:
            stream.write('x')
    """)
    assert cli.main(["fake"]) == 1
    assert "No space left on device" in capsys.readouterr().err


def test_sigterm_unwinds_so_that_clean_up_runs(tmp_path):
    (tmp_path / "slow_verb.py").write_text(textwrap.dedent("""
        import time
        def main(argv):
            try:
                print("started", flush=True)
                time.sleep(60)
            finally:
                print("closed", flush=True)
    """))
    code = ("import sys; from qcn_jax.cli import main as cli; "
            "cli.VERBS['slow'] = ('slow_verb', ''); sys.exit(cli.main(['slow']))")
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])})
    assert child.stdout.readline() == "started\n"
    child.send_signal(signal.SIGTERM)
    assert child.communicate(timeout=600)[0] == "closed\n"
    assert child.returncode == 143


def test_user_error_is_what_it_says():
    assert str(UserError("--x: no")) == "--x: no"


@pytest.mark.parametrize("where", ["finalizer", "collection"])
def test_a_signal_where_exceptions_are_dropped_still_ends_the_process(where):
    """Python swallows SystemExit out of `__del__` and of gc callbacks; the signal must not be lost with it."""
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(f"""
        import gc, os, signal, sys, time
        from qcn_jax.cli import main as cli

        strike = lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.1))

        class Dying:
            def __del__(self):
                strike()

        def callback(phase, info):
            if phase == "start":
                strike()

        signal.signal(signal.SIGTERM, cli._terminate)
        try:
            if "{where}" == "finalizer":
                Dying()
            else:
                gc.callbacks.append(callback)
                gc.collect()
                gc.callbacks.remove(callback)
            time.sleep(30)
        finally:
            print("cleaned up", flush=True)
    """)], capture_output=True, text=True, timeout=600, check=False)  # fmt: skip
    assert child.returncode == cli.TERMINATED and child.stdout == "cleaned up\n", child.stderr
