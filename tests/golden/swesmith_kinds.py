"""Writes swesmith_kinds.json: what the swesmith package's thirteen procedural modifiers make of small sources.

    SWESMITH_INTERPRETER tests/golden/swesmith_kinds.py

The sources are ours; only what comes out is kept, as the reference for test_inject.py.
"""

import json
import pathlib

from swesmith.bug_gen.procedural.python import MODIFIERS_PYTHON
from swesmith.constants import CodeEntity

CLASS = "class C(A, B):\n    x = 1\n\n    def f(self):\n        return self.x\n\n    def g(self):\n        return 2\n"
SOURCES = {
    "func_pm_class_rm_base": CLASS,
    "func_pm_class_rm_funcs": CLASS,
    "func_pm_class_shuffle_funcs": CLASS,
    "func_pm_ctrl_invert_if": "def f(x):\n    if x:\n        y = 1\n    else:\n        y = 2\n    return y\n",
    "func_pm_ctrl_shuffle": "def f(x):\n    y = x + 1\n    x = y * 2\n",
    "func_pm_remove_assign": "def f(x):\n    x += 1\n    return x\n",
    "func_pm_remove_cond": "def f(x):\n    if x > 3:\n        x = 3\n    return x\n",
    "func_pm_remove_loop": "def f(x):\n    for i in x:\n        x[i] = 0\n    return x\n",
    "func_pm_remove_wrapper": "def f(x):\n    with x:\n        x.go()\n    return x\n",
    "func_pm_op_break_chains": "def f(a, b, c):\n    return a + b + c\n",
    "func_pm_op_change_const": "def f(a):\n    return a + 5\n",
    "func_pm_op_change": "def f(a, b):\n    return a - b\n",
    "func_pm_op_swap": "def f(a, b):\n    return a - b\n",
}


class Entity(CodeEntity):
    """A piece of source, as the modifiers read it."""

    def __init__(self, text):
        self.src_code = text


def main():
    """Runs every modifier until it has shown all it does."""
    rows = {}
    for modifier in MODIFIERS_PYTHON:
        source, outputs = SOURCES[modifier.name], set()
        for _ in range(200):
            bug = modifier.modify(Entity(source))
            if bug is not None:
                outputs.add(bug.rewrite)
        rows[modifier.name] = {"source": source, "outputs": sorted(outputs)}
    path = pathlib.Path(__file__).with_name("swesmith_kinds.json")
    path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
