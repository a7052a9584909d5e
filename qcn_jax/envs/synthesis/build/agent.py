"""The agent that builds where rules do not: a model gives commands, sees what they print, and submits a recipe.

Its commands run in a container with a network, which is thrown away; what it submits is run from nothing, and rejected
by execution with the reason told, until it is accepted or the turns are used up.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping

import docker

from qcn_jax.chat import endpoint
from qcn_jax.envs.synthesis.build.container import Container
from qcn_jax.envs.synthesis.build.rules import Recipe
from qcn_jax.envs.synthesis.languages import LANGUAGES
from qcn_jax.envs.tasks import log_parsers
from qcn_jax.errors import UserError

COMMAND_SECONDS = 600.0
SHOWN = 4000  # characters of a command's output, the middle left out
LISTED = 80  # files in the first message
_BLOCK = re.compile(r"```(bash|sh|shell|json)\n(.*?)```", re.DOTALL)

_SYSTEM = """You make a repository's tests run in a Debian 12 container. The repository is at /testbed; you are root
and have a network (apt-get, pip, npm, go). Python needs a virtual environment: python3 -m venv /opt/env.

Answer every message with exactly one block.
A command to run:
```bash
COMMAND
```
or, when you know what is needed, the recipe (it is run from nothing in a fresh container; the test command runs
without a network and must run the repository's own tests):
```json
{{"language": "{languages}", "packages": ["DEBIAN-PACKAGE"], "install": ["COMMAND"], "test": "COMMAND",
  "parser": "{parsers}", "variables": {{"NAME": "VALUE"}}}}
```
Parsers: pytest reads `pytest -rA`; unittest `python -m unittest -v`; tap TAP, e.g. `node --test --test-reporter=tap`;
jest
`jest --verbose`; mocha its spec reporter; go_test `go test -json`."""


def build(
    client: docker.DockerClient, base: str, files: Mapping[str, bytes], name: str, reason: str,
    model: endpoint.Endpoint, turns: int, log: Callable[[str], None], attempt: Callable[[Recipe], "object"],
):
    """Lets the model work until `attempt` accepts a recipe; returns what `attempt` returned.

    Raises:
      UserError: the turns are used up, or the endpoint cannot be used.
    """
    from qcn_jax.envs.synthesis.build import BuildFailed

    system = _SYSTEM.format(languages="|".join(LANGUAGES), parsers="|".join(log_parsers.RUNNERS))
    listing = sorted(files)
    first = (f"Rules did not lead to an environment:\n{reason}\n\nFiles:\n" + "\n".join(listing[:LISTED])
             + (f"\n... and {len(listing) - LISTED} more" if len(listing) > LISTED else ""))
    messages = [{"role": "system", "content": system}, {"role": "user", "content": first}]
    submitted = 0
    with Container(client, base, network=True) as container:
        container.write(dict(files))
        for turn in range(1, turns + 1):
            answer = model.ask(messages)
            found = _BLOCK.search(answer)
            if found is None:
                reply = "Answer with one ```bash or ```json block."
            elif found[1] == "json":
                submitted += 1
                try:
                    built = attempt(_recipe(found[2]))
                    log(f"{name}: the model's recipe {submitted} is accepted after {turn} turns")
                    return dataclasses.replace(built, attempts=submitted)
                except BuildFailed as error:
                    log(f"{name}: recipe {submitted} is rejected: {str(error).splitlines()[0]}")
                    reply = f"The recipe is rejected: {error}"
            else:
                result = container.exec(found[2], COMMAND_SECONDS)
                ended = "timed out" if result.timed_out else f"exit status {result.exit_code}"
                reply = f"{_shortened(result.output)}\n({ended})"
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": reply}]
    raise UserError(f"{name}: the model built no environment in {turns} turns")


def _recipe(text: str) -> Recipe:
    """Reads a submission; raises BuildFailed with what is wrong with it."""
    from qcn_jax.envs.synthesis.build import BuildFailed

    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BuildFailed(f"the recipe is not JSON: {error}") from error
    lists = {name: row.get(name, []) for name in ("packages", "install")} if isinstance(row, dict) else {}
    if not lists or not all(isinstance(v, list) and all(isinstance(e, str) for e in v) for v in lists.values()):
        raise BuildFailed("packages and install must be lists of texts")
    if row.get("language") not in LANGUAGES:
        raise BuildFailed(f"language must be one of {', '.join(LANGUAGES)}")
    if row.get("parser") not in log_parsers.RUNNERS:
        raise BuildFailed(f"parser must be one of {', '.join(log_parsers.RUNNERS)}")
    if not isinstance(row.get("test"), str) or not row["test"].strip():
        raise BuildFailed("test must be a command")
    wrong = [name for name in lists["packages"] if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]*", name)]
    if wrong:
        raise BuildFailed(f"{wrong[0]!r} is no Debian package's name")
    variables = row.get("variables") or {}
    if not isinstance(variables, dict) or not all(
        re.fullmatch(r"\w+", name) and "\n" not in str(value) for name, value in variables.items()
    ):
        raise BuildFailed("variables must map names to one-line values")
    return Recipe(row["language"], tuple(lists["packages"]), tuple(lists["install"]), row["test"], row["parser"],
                  tuple((name, str(value)) for name, value in variables.items()), ("a model",))


def _shortened(text: str) -> str:
    if len(text) <= SHOWN:
        return text
    return f"{text[: SHOWN // 2]}\n[... {len(text) - SHOWN} characters left out ...]\n{text[-SHOWN // 2 :]}"
