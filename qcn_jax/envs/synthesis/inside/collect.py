"""Runs inside a sandbox as a program of its own: writes every test's id and parameters to the file argv[1].

The file is JSON, packed by zlib and written in base 85, as large suites have some 100,000 tests. Further arguments go
to pytest. Parameters matter because ids such as `case0` do not tell them. null stands for parameters whose place in an
order that changes is all that the id tells.
"""

import base64
import json
import re
import sys
import zlib

import pytest


def cases(session):
    """{id: representation of the parameters, without addresses; None where the id numbers members of a set}."""
    found = {}
    for item in session.items:
        parameters = getattr(item, "callspec", None)
        try:
            text = ascii(sorted(parameters.params.items(), key=lambda pair: pair[0])) if parameters else ""
        except Exception as error:
            text = type(error).__name__
        text = re.sub(r"0x[0-9a-fA-F]{4,}", "0x", text)[:500]
        wanders = parameters and any(numbered(mark, parameters.id) for mark in item.iter_markers("parametrize"))
        found[item.nodeid] = None if wanders else text
    return found


def numbered(mark, parameters_id):
    """Whether a parametrize mark takes several values from a set and the id tells only their place in it."""
    names, values = names_and_values(*mark.args, **mark.kwargs)
    if not isinstance(values, (set, frozenset)) or len(values) < 2:
        return False
    names = re.split(r"[,\s]+", names.strip()) if isinstance(names, str) else names
    return any(re.search(rf"(?:^|-){re.escape(name)}\d+(?:-|$)", parameters_id) for name in names)


def names_and_values(argnames=(), argvalues=(), *_, **__):
    """Of pytest.mark.parametrize's arguments the first two, however they were given."""
    return argnames, argvalues


class Collected:
    """Writes what was collected."""

    @pytest.hookimpl(hookwrapper=True)
    def pytest_make_collect_report(self, collector):
        outcome = yield
        if outcome.excinfo is not None and issubclass(outcome.excinfo[0], SystemExit):
            outcome.force_result(pytest.CollectReport(collector.nodeid, "failed", "SystemExit at import", []))

    def pytest_collection_finish(self, session):
        with open(sys.argv[1], "wb") as stream:
            stream.write(base64.b85encode(zlib.compress(json.dumps(cases(session)).encode())))


if __name__ == "__main__":
    pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors",
                 "--maxfail=0", *sys.argv[2:]],
                plugins=[Collected()])
