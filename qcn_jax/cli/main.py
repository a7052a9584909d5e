"""`qcn VERB ...`: finds the verb's module, runs it, and turns bad input into one line on stderr."""

import errno
import gc
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from qcn_jax import files
from qcn_jax.errors import UserError
from qcn_jax.hostmemory import keep_freed_memory

# verb: (module with main(argv) -> exit status, what it does). Modules are imported only when called, so that
# `qcn verify` never pays for JAX.
VERBS = {
    "run": ("qcn_jax.cli.run", "every stage from repositories to a trained and evaluated agent; resumable"),
    "synthesize": ("qcn_jax.cli.synthesize", "make verified tasks from repositories, with yields"),
    "problems": ("qcn_jax.cli.problems", "make single-turn problems, or tests by vote of solutions, verified"),
    "verify": ("qcn_jax.cli.verify", "check tasks: the gold patch passes, the empty patch fails"),
    "collect": ("qcn_jax.cli.collect", "let an agent act on tasks and keep what execution verifies, to learn from"),
    "evaluate": ("qcn_jax.cli.evaluate", "resolved rate of a model or of predictions, with 95 % interval"),
    "compare": ("qcn_jax.cli.compare", "evaluations paired: won, lost, exact p, intervals"),
    "replay": ("qcn_jax.cli.replay", "derive a run's RL again from its journals; other settings on the same episodes"),
    "fix": ("qcn_jax.cli.fix", "let an agent mend a failing test of a repository; prints the graded diff"),
    "convert": ("qcn_jax.cli.convert", "Hugging Face checkpoint in and out"),
    "preview-data": ("qcn_jax.cli.preview_data", "rows as a stage trains on them: tokens, segments, loss"),
    "compile": ("qcn_jax.cli.compile", "compile a config's step for a named TPU topology"),
    "generate": ("qcn_jax.cli.generate", "text from a checkpoint"),
    "check-engine": ("qcn_jax.cli.check_engine", "hold every way to run a checkpoint against the plainest one"),
    "serve": ("qcn_jax.cli.serve", "OpenAI-compatible HTTP server for a checkpoint"),
    "doctor": ("qcn_jax.cli.doctor", "what this machine has: devices, Docker, registry, disk"),
}
# Verbs that step a model over and over.
_COMPUTING = ("run", "replay", "collect", "evaluate", "fix", "generate", "serve", "check-engine")
_FINALIZERS = ("__del__", "_xla_gc_callback")
_AGAIN_SECONDS = 0.02  # until a signal that came during a finalizer is tried again
TERMINATED = 128 + signal.SIGTERM  # the exit status a shell reports for a process that SIGTERM ended

# What no program can prevent: the user's rights, paths that lead nowhere, full or broken disks.
_MACHINE_SAYS_NO = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG,
    errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE,
)  # fmt: skip
_QUIET = {  # chatter of libraries on stderr that says nothing about this program
    "TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "ERROR", "GLOG_minloglevel": "2",
    "TOKENIZERS_PARALLELISM": "false",
}


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Runs `qcn ARGV...`; returns the exit status, 0 only on success."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(_overview())
        return 0 if argv else 1
    verb, arguments = argv[0], list(argv[1:])
    if verb not in VERBS:
        return _fail("qcn", f"unknown verb {verb!r}; verbs: {', '.join(available_verbs())}")
    if verb in _COMPUTING:  # now, because JAX is imported later
        keep_freed_memory()
        if verb != "run":  # which keeps what it compiles beside its results
            os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(files.cache_folder("xla")))
    return _run_verb(verb, arguments)


def available_verbs() -> list[str]:
    """The verbs whose module is part of this installation."""
    return [verb for verb, (module, _) in VERBS.items() if importlib.util.find_spec(module) is not None]


def _run_verb(verb: str, arguments: list[str]) -> int:
    from absl import flags, logging

    from qcn_jax.cli.parsing import HelpShown

    logging.set_verbosity(logging.ERROR)
    flags.FLAGS.mark_as_parsed()  # libraries read absl's global flags; the verb's own are elsewhere
    if verb not in available_verbs():
        return _fail("qcn", f"verb {verb!r} is not part of this version; verbs: {', '.join(available_verbs())}")
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return importlib.import_module(VERBS[verb][0]).main(arguments)
    except HelpShown:
        return 0
    except UserError as error:
        return _fail(f"qcn {verb}", str(error))
    except OSError as error:
        if error.errno not in _MACHINE_SAYS_NO:
            raise
        return _fail(f"qcn {verb}", f"{error.filename or 'disk'}: {error.strerror}")
    except KeyboardInterrupt:
        return _fail(f"qcn {verb}", "interrupted") + 129  # 130: what a shell reports for SIGINT
    except BrokenPipeError:
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(signum: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds the stack like Ctrl-C, so that sandboxes and worker processes are closed.

    Python reports an exception out of a finalizer or a callback of the garbage collector and drops it, so where the
    signal comes during one, it is put off until that has returned.
    """
    if _drops_exceptions(frame):
        signal.signal(signal.SIGALRM, _terminate)
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second SIGTERM must not interrupt the clean-up
    raise SystemExit(TERMINATED)


def _drops_exceptions(frame: FrameType | None) -> bool:
    while frame is not None:
        code = frame.f_code
        if code.co_name in _FINALIZERS or any(code is getattr(f, "__code__", None) for f in gc.callbacks):
            return True
        frame = frame.f_back
    return False


def _fail(who: str, line: str) -> int:
    print(f"{who}: {' '.join(line.split())}", file=sys.stderr, flush=True)
    return 1


def _overview() -> str:
    verbs = "\n".join(f"  {verb:<12} {VERBS[verb][1]}" for verb in available_verbs())
    return ("qcn: repositories become verifiable tasks, an agent acts in them, tests become reward, reward becomes "
            f"better weights\n\nusage: qcn VERB [--flags]\n\n{verbs}\n\nqcn VERB --help explains a verb.")
