"""From a repository to an environment that runs its tests: by rules first, then by an agent that reads the failures.

An environment is kept only if its test command, run without network, passes some tests, and if it is a verifier by
verifier.py: failing on a defective state, passing on the fixed one, running the code.
"""

import dataclasses
import hashlib
import io
import random
from collections.abc import Callable, Mapping

import docker
import docker.errors

from qcn_jax.chat import endpoint
from qcn_jax.envs.sandbox import images, layers
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.synthesis.build import agent, rules, verifier
from qcn_jax.envs.synthesis.build.container import Container
from qcn_jax.envs.synthesis.build.rules import Recipe
from qcn_jax.envs.synthesis.languages import LANGUAGES
from qcn_jax.errors import UserError

INSTALL_SECONDS = 1200.0  # for one command
LEAST_PASSING = 0.5  # share of the tests that must pass on the repository as it is
DEFECTS_TRIED = 16  # until one makes a test fail
LOG_TAIL = 3000  # characters of a failed command that are shown
Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Environment:
    """A built environment: `image` holds the repository at /testbed with everything installed.

    `outcomes` are its tests' on the repository as it is; `acceptance` says what the verifier was tried on.
    """

    recipe: Recipe
    image: str
    dockerfile: str
    outcomes: dict[str, str]
    seconds: float
    acceptance: verifier.Acceptance
    attempts: int = 1

    @property
    def passing(self) -> tuple[str, ...]:
        """Tests that pass on the repository as it is."""
        return tuple(name for name, outcome in self.outcomes.items() if outcome == "passed")


class BuildFailed(Exception):
    """An attempt that did not give an environment; the text is what its author needs to know."""


def build(
    files: Mapping[str, bytes], name: str, log: Log, base: str = "", model: endpoint.Endpoint | None = None,
    turns: int = 30, client: docker.DockerClient | None = None, test_seconds: float = 300.0,
) -> Environment:
    """Builds an environment for a repository.

    Args:
      files: the repository's files by path.
      name: for the image's tag.
      log: takes progress lines.
      base: image to start from (default: images.base_image's).
      model: asked when the rules do not lead to an environment; None: rules alone.
      turns: commands that the model may give.
      client: of a Docker engine.
      test_seconds: limit of one run of all tests.

    Raises:
      UserError: no environment could be built; the message says why.
      SandboxError: no Docker engine.
    """
    from qcn_jax.envs.synthesis.build.container import engine

    client = client or engine()
    base = images.base_image(client, base)
    texts = {path: data.decode("utf-8", "replace") for path, data in files.items()}
    reason = ""
    try:
        recipe = rules.plan(texts)
        log(f"{name}: {recipe.language} by {', '.join(recipe.why) or 'its files'}: {recipe.test}")
        return attempt(client, base, recipe, files, name, test_seconds)
    except (BuildFailed, UserError) as error:
        reason = str(error)
        log(f"{name}: rules: {_brief(reason)}")
    if model is None:
        raise UserError(f"{name}: no environment by rules ({_brief(reason)}); --endpoint lets a model try")
    return agent.build(client, base, files, name, reason, model, turns, log,
                       lambda recipe: attempt(client, base, recipe, files, name, test_seconds))


def _brief(reason: str) -> str:
    """What failed, and the longest of the last lines that it printed, where the cause mostly stands."""
    what, *printed = [line.strip() for line in reason.splitlines() if line.strip()]
    return f"{what} {max(printed[-5:], key=len)[:200]}" if printed else what


def toolchain(client: docker.DockerClient, base: str, recipe: Recipe) -> str:
    """The image with what the language needs, built once for each base and set of packages."""
    text = recipe.toolchain(base)
    name = f"qcn-toolchain:{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if known := layers.use(client, name):
        return known
    labelled = text + f"LABEL {images.LABEL}=toolchain\n"
    try:
        image, _ = client.images.build(fileobj=io.BytesIO(labelled.encode()), tag=name, rm=True, forcerm=True)
    except docker.errors.BuildError as error:
        words = [entry.get("stream", "") for entry in error.build_log if isinstance(entry, dict)]
        raise BuildFailed(f"Debian packages cannot be installed: {''.join(words)[-LOG_TAIL:]}") from error
    except docker.errors.DockerException as error:
        raise SandboxError(f"image {name} cannot be built: {error}") from error
    return image.id


def attempt(
    client: docker.DockerClient, base: str, recipe: Recipe, files: Mapping[str, bytes], name: str, test_seconds: float
) -> Environment:
    """Installs by a recipe, runs its tests without network, and accepts or rejects the verifier.

    Raises:
      BuildFailed: a command fails, too few tests pass, or the verifier is none.
    """
    image = _installed(client, base, recipe, files, name)
    judge = verifier.Verifier(recipe.test, recipe.parser, test_seconds)
    try:
        with Container(client, image) as container:
            first = verifier.run(container, judge)
            passing = [test for test, outcome in first.outcomes.items() if outcome == "passed"]
            if not passing or len(passing) < LEAST_PASSING * len(first.outcomes):
                ended = f"exit status {first.status}{', timed out' if first.timed_out else ''}"
                raise BuildFailed(f"`{recipe.test}` passes {len(passing)} of {len(first.outcomes)} tests ({ended}):\n"
                                  f"{first.log[-LOG_TAIL:]}")
            acceptance = _accepted(container, judge, recipe.language, files, passing)
    except BuildFailed:
        client.images.remove(image, force=True)
        raise
    named = next(iter(client.images.get(base).tags), base)  # a name means more than an id where the file is read
    return Environment(recipe, image, recipe.dockerfile(named), first.outcomes, first.seconds, acceptance)


def _installed(
    client: docker.DockerClient, base: str, recipe: Recipe, files: Mapping[str, bytes], name: str
) -> str:
    """The tag of the image with everything installed; made once for the same recipe, base and files."""
    content = hashlib.sha256(repr((recipe.toolchain(base), recipe.install, sorted(files.items()))).encode()).hexdigest()
    tag = f"qcn-build:{_tag(name)}-{content[:12]}"
    if layers.use(client, tag):
        return tag
    with Container(client, toolchain(client, base, recipe), network=True) as container:
        container.write(dict(files))
        for command in recipe.install:
            result = container.exec(command, INSTALL_SECONDS)
            if result.exit_code:
                raise BuildFailed(f"`{command}` exits with {result.exit_code}:\n{result.output[-LOG_TAIL:]}")
        container.commit(tag, (f"LABEL {images.LABEL}=repository",))
    return tag


def _accepted(
    container: Container, judge: verifier.Verifier, language: str, files: Mapping[str, bytes], passing: list[str]
) -> verifier.Acceptance:
    """Finds a defect that the verifier sees and tries it on the other states; raises BuildFailed where it is none."""
    speaks = LANGUAGES[language]
    sources = {path: data.decode("utf-8", "replace") for path, data in files.items()
               if speaks.is_source(path) and not path.startswith(("docs/", "examples/"))}
    rng = random.Random(0)
    found = [injection for path, text in sorted(sources.items())
             for injection in speaks.candidates(text, path, rng=rng)]
    rng.shuffle(found)
    for injection in found[:DEFECTS_TRIED]:
        defect = {injection.path: injection.after_source}
        container.write(defect)
        seen = not verifier.passes(verifier.run(container, judge), passing)
        container.write({injection.path: sources[injection.path]})
        if seen:
            acceptance = verifier.accept(container, judge, language, sources, defect, passing)
            if acceptance.problems:
                raise BuildFailed(f"the verifier `{judge.command}` {'; '.join(acceptance.problems)}")
            return acceptance
    raise BuildFailed(f"the verifier `{judge.command}` notices none of {min(len(found), DEFECTS_TRIED)} defects")


def _tag(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")[:40] or "repository"
