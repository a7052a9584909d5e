"""Functions are found in Python text by name."""

from qcn_jax.agents import python_code

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
    assert python_code.find_function(SOURCE, "Box.get") == (14, 17)
    assert python_code.find_function(SOURCE, "get") == (21, 22)
    assert python_code.find_function(SOURCE, "inner") == (15, 16)
    assert python_code.find_function(SOURCE, "size") == (6, 7)
    assert python_code.find_function(SOURCE, "Box.size", line=11) == (10, 11)
    assert python_code.find_function(SOURCE, "absent") is None
    assert python_code.function_spans("def f(:") == ()
