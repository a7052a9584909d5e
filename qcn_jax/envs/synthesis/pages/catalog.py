"""Templates of pages: small components with tests of what visitors see, whose words differ from seed to seed.

A name `pages:checklist:3` stands for the template `checklist` with the words of seed 3, and is a repository as others
are. Files hold {{WORD}}, and words.json lists what each may be; a line {{START}} stands for what the style sheets, or
the pages, of all templates begin with.
"""

import json
import pathlib
import random
import re

from qcn_jax.envs.sandbox import repository
from qcn_jax.errors import UserError

FOLDER = pathlib.Path(__file__).parent / "templates"
NAMES = tuple(sorted(path.name for path in FOLDER.iterdir() if path.is_dir()))
_NAME = re.compile(r"pages:([a-z]+):(\d{1,6})")
_START = "{{START}}\n"
_WORD = re.compile(r"\{\{(\w+)\}\}")


def is_name(name: str) -> bool:
    """Whether a repository's name is one of a template with a seed."""
    return _NAME.fullmatch(name) is not None


def fill(name: str) -> dict[str, str]:
    """The files of a template, by path.

    Raises:
      UserError: there is no such template.
    """
    found = _NAME.fullmatch(name)
    if found is None or found[1] not in NAMES:
        raise UserError(f"--repo: {name!r} is no template of pages; allowed: pages:NAME:SEED with NAME one of "
                        f"{', '.join(NAMES)}")
    folder = FOLDER / found[1]
    listed = json.loads((folder / "words.json").read_text())
    rng = random.Random(name)
    words = {key: rng.choice(choices) for key, choices in listed.items()}
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "words.json")
    return {path.relative_to(folder).as_posix(): _WORD.sub(lambda match: words[match[1]], _text(path))
            for path in paths}


def _text(path: pathlib.Path) -> str:
    """A file of a template with what all of its kind begin with."""
    text = path.read_text()
    return text.replace(_START, (FOLDER / f"start{path.suffix}").read_text()) if _START in text else text


def write(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Writes the archive of a template into `folder`; returns its path."""
    path = folder / f"{name.replace(':', '-')}.tar.gz"
    contents = {place: (text.encode(), 0o644) for place, text in fill(name).items()}
    repository.write_archive(path, path.name.removesuffix(".tar.gz"), contents)
    return path
