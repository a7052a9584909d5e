"""What all tests share: markers for things a machine may lack, compilation cache, the fixtures of qcn_jax.testing.

A test marked `docker`, `torch`, `browser` or `vite` is skipped with a reason where the thing is missing; where the environment
variable QCN_REQUIRE (a comma-separated list) names it, the test fails instead, so that a continuous-integration
machine cannot pass by lacking something.
"""

import functools
import importlib.util
import os
import pathlib
from collections.abc import Callable

import pytest

pytest_plugins = ["qcn_jax.testing.plugin"]

ROOT = pathlib.Path(__file__).resolve().parent.parent
_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "qcn_jax" / "xla"

# Before anything imports JAX; the children of tests inherit it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Behind JAX's own variables, which it reads when it is imported; XLA reads its flags with the first program.
from qcn_jax.testing.processes import QUICK_FLAGS  # noqa: E402

if QUICK_FLAGS not in os.environ.get("XLA_FLAGS", ""):  # pytest-xdist's workers inherit what the first process set
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_FLAGS}".strip()

# Files of a minute and more, longest first: begun early, none is still running when the other workers have no more to do.
LONGEST = (
    "pipeline/test_hosts.py", "test_docs.py", "attacks/test_other_languages.py", "envs/synthesis/test_build.py",
    "pipeline/stages/test_on_devices.py", "test_model_parity.py", "pipeline/test_chain.py", "sharding/test_forms.py",
    "cli/test_compile.py", "envs/sandbox/test_layers.py", "cli/test_synthesize_verify.py", "test_thirdparty.py",
    "pipeline/test_recipes.py", "pipeline/stages/test_family.py", "layers/test_delta_rule.py", "attacks/test_attacks.py",
    "pipeline/rl/test_learner.py", "test_model.py", "pipeline/test_distributed.py", "pipeline/stages/test_midtrain.py",
    "layers/test_sharded.py", "inference/test_conformance.py", "envs/sandbox/test_sandbox.py",
)

QWEN_TOKENIZER = pathlib.Path(os.environ.get(
    "QCN_QWEN_TOKENIZER", ROOT / "../shared/data/qwen3-tokenizer/tokenizer.json"))


@functools.cache
def docker_missing() -> str | None:
    """Why Docker tests cannot run here; None where an engine answers."""
    import docker

    try:
        docker.from_env(timeout=10).ping()
    except docker.errors.DockerException as error:
        return f"no Docker engine answers: {str(error).splitlines()[0][:120]}"
    return None


@functools.cache
def torch_missing() -> str | None:
    """Why tests against the reference implementation cannot run here; None where they can."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


@functools.cache
def browser_missing() -> str | None:
    """Why pages cannot be opened here; None where they can."""
    from qcn_jax.envs.web import runtime

    return runtime.missing() or None


@functools.cache
def vite_missing() -> str | None:
    """Why pages cannot be built here; None where they can, npm having installed what they are built from."""
    from qcn_jax.envs.web import vendored

    return vendored.missing() or None


_THINGS: dict[str, Callable[[], str | None]] = {"docker": docker_missing, "torch": torch_missing,
                                                "browser": browser_missing, "vite": vite_missing}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips, or fails where QCN_REQUIRE says so, a test whose marker names a thing that is missing."""
    required = {name for name in os.environ.get("QCN_REQUIRE", "").split(",") if name}
    for name in _THINGS:
        reason = _THINGS[name]() if item.get_closest_marker(name) else None
        if reason and name in required:
            pytest.fail(f"QCN_REQUIRE demands {name}: {reason}", pytrace=False)
        if reason:
            pytest.skip(reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Brings the files of LONGEST first, as they stand there."""
    rank = {f"tests/{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Gives each of pytest-xdist's workers whole files, so that what a file's tests share is made once."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # which would bring the files with most tests first, not the longest
    return LoadFileScheduling(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """Refuses a QCN_REQUIRE that names nothing known, which would otherwise demand nothing in silence."""
    unknown = {name for name in os.environ.get("QCN_REQUIRE", "").split(",") if name} - set(_THINGS)
    if unknown:
        raise pytest.UsageError(f"QCN_REQUIRE: unknown {', '.join(sorted(unknown))}; known: {', '.join(_THINGS)}")


@pytest.fixture(scope="session")
def qwen_tokenizer_path() -> pathlib.Path:
    """Path of Qwen3's tokenizer.json, which the repository does not carry."""
    if not QWEN_TOKENIZER.is_file():
        pytest.skip(f"{QWEN_TOKENIZER} is not here; set QCN_QWEN_TOKENIZER to a copy of Qwen3's tokenizer.json")
    return QWEN_TOKENIZER
