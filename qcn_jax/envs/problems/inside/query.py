"""Runs the query in answer.sql, which may only read, on the database that standard input describes; rows as JSON."""

import json
import pathlib
import sqlite3
import sys

READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, 33}  # 33: SQLITE_RECURSIVE
database = sqlite3.connect(":memory:")
database.executescript(json.load(sys.stdin)["setup"])
database.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in READS else sqlite3.SQLITE_DENY)
try:
    answer = pathlib.Path(__file__).with_name("answer.sql").read_text()
    said = {"value": [list(row) for row in database.execute(answer)]}
except (sqlite3.Error, sqlite3.Warning) as error:
    said = {"raised": [type(error).__name__]}
print(json.dumps(said))
