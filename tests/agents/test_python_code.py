"""Functions are found in Python text by name."""

import functools

from qcn_jax.agents import python_code, source_code

SOURCE = '''\
import functools


class Box:
    @property
    def size(self):
        return self._size

    @size.setter
    def size(self, value):
        self._size = value

    @functools.lru_cache
    def get(self):
        def inner():
            return 1
        return inner()


if True:
    def get():
        return (lambda x: x)(2)
'''


def test_function_spans_are_found_by_name():
    names = [span[0] for span in python_code.function_spans(SOURCE)]
    assert names == ["Box", "Box.size", "Box.size", "Box.get", "Box.get.inner", "get"]
    find = functools.partial(source_code.find_function, SOURCE, "boxes.py")
    assert find("Box.get") == (14, 17)
    assert find("get") == (21, 22)
    assert find("inner") == (15, 16)
    assert find("size") == (6, 7)
    assert find("Box.size", line=11) == (10, 11)
    assert find("absent") is None
    assert python_code.function_spans("def f(:") == ()


SCRIPT = """\
class Box {
  size() {
    return 1;
  }
}

const twice = (value) => {
  return 2 * value;
};
function size(box) {
  return box.size();
}
"""


def test_functions_of_scripts_are_found_by_name():
    names = [span[0] for span in source_code.function_spans(SCRIPT, "box.js")]
    assert names == ["Box.size", "twice", "size"]
    find = functools.partial(source_code.find_function, SCRIPT, "box.js")
    assert find("Box.size") == (2, 4) and find("size") == (10, 12) and find("twice") == (7, 9)
    assert find("absent") is None and source_code.find_function(SCRIPT, "box.css", "size") is None
    assert source_code.parses(["const a = 1 +", "  2;"], "a.js") and not source_code.parses(["if (a"], "a.js")
    assert source_code.parses(["a {"], "a.css") and not source_code.parses(["a {"], "a.py")
