"""Runs inside a sandbox as a program of its own: writes every test's id and parameters to the JSON file argv[1].

Further arguments go to pytest. Parameters matter because ids such as `case0` do not tell them.
"""

import json
import re
import sys

import pytest


def cases(session):
    """{id: representation of the parameters, without addresses}."""
    found = {}
    for item in session.items:
        parameters = getattr(item, "callspec", None)
        try:
            text = ascii(sorted(parameters.params.items(), key=lambda pair: pair[0])) if parameters else ""
        except Exception as error:
            text = type(error).__name__
        found[item.nodeid] = re.sub(r"0x[0-9a-fA-F]{4,}", "0x", text)[:500]
    return found


class Collected:
    """Writes what was collected."""

    def pytest_collection_finish(self, session):
        with open(sys.argv[1], "w", encoding="utf-8") as stream:
            json.dump(cases(session), stream)


if __name__ == "__main__":
    pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", *sys.argv[2:]],
                plugins=[Collected()])
