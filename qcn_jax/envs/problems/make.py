"""Problems of our own, drawn from families by seeds, each with tests from a reference and a solution to be verified."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qcn_jax.envs.problems.families import instructions, library, secure, sql, stdio
from qcn_jax.envs.problems.schema import KINDS

Row = dict[str, Any]
# kind -> families: (rng, language) -> a row without id and kind, or None where a family has no such language.
FAMILIES: Mapping[str, Sequence[Callable[[random.Random, str], Row | None]]] = {
    "stdio": stdio.FAMILIES, "library": library.FAMILIES, "sql": sql.FAMILIES, "secure": secure.FAMILIES,
    "instructions": instructions.FAMILIES,
}
assert tuple(FAMILIES) == KINDS


def problems(count: int, seed: int, kinds: Sequence[str] = KINDS, languages: Sequence[str] = ("python",),
             split: str = "train") -> list[Row]:
    """`count` rows, the kinds in turn; those of one split (train, heldout) share no numbers with the other's.

    The same arguments give the same rows, and a longer list begins with a shorter one.
    """
    rows: list[Row] = []
    number = 0
    while len(rows) < count:
        kind = kinds[number % len(kinds)]
        language = languages[number // len(kinds) % len(languages)]
        rng = random.Random(f"{seed} {split} {number}")
        families = list(FAMILIES[kind])
        rng.shuffle(families)
        made = next((row for family in families if (row := family(rng, language)) is not None), None)
        if made is not None:
            rows.append({"id": f"{kind}_{split}_{seed}_{number}", "kind": kind, **made})
        number += 1
    return rows
