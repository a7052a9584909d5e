"""Queries on small SQLite databases; the hidden tests are databases that the prompt does not show."""

import random
import sqlite3
from typing import Any

_NAMES = ("Ada", "Ben", "Cem", "Dia", "Eva", "Finn", "Gil", "Hana", "Ivo", "Jana")
_SCHEMA = ("CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT);\n"
           "CREATE TABLE orders (id INTEGER PRIMARY KEY, customer_id INTEGER, amount INTEGER, month INTEGER);\n")


def _database(rng: random.Random, customers: int, orders: int) -> str:
    """A script that makes a database; some customers have no order, amounts repeat."""
    lines = [f"INSERT INTO customers VALUES ({number}, '{_NAMES[number - 1]}', '{rng.choice(['Rome', 'Oslo', 'Lima'])}');"
             for number in range(1, customers + 1)]
    lines += [f"INSERT INTO orders VALUES ({number}, {rng.randint(1, max(customers - 1, 1))}, {rng.randint(1, 12) * 10}, "
              f"{rng.randint(1, 12)});" for number in range(1, orders + 1)]
    return _SCHEMA + "\n".join(lines)


def _row(rng: random.Random, ask: str, query: str, ordered: bool = False) -> dict[str, Any]:
    setups = [_database(rng, *size) for size in ((4, 6), (3, 0), (1, 1), (6, 15), (10, 40), (8, 60))]
    tests = []
    for setup in setups:
        with sqlite3.connect(":memory:") as database:
            database.executescript(setup)
            rows = [list(row) for row in database.execute(query)]
        tests.append({"setup": setup, "rows": rows, "ordered": ordered})
    prompt = (f"A SQLite database is made so:\n\n{setups[0]}\n\nWrite one query for any data in these tables: {ask} "
              f"\n\nWith the data above it gives {tests[0]['rows']}.")
    return {"prompt": prompt, "solution": query, "tests": tests}


def spenders(rng: random.Random, language: str) -> dict[str, Any]:
    """Sums above a limit, with those who have no orders left out."""
    del language
    limit = rng.randint(4, 20) * 10
    return _row(rng, f"the name of each customer whose orders come to more than {limit} in all, and that sum, in any order.",
                "SELECT c.name, SUM(o.amount) FROM customers c JOIN orders o ON o.customer_id = c.id "
                f"GROUP BY c.id HAVING SUM(o.amount) > {limit}")


def idle(rng: random.Random, language: str) -> dict[str, Any]:
    """Customers without an order from a month on."""
    del language
    month = rng.randint(2, 11)
    return _row(rng, f"the names of customers that have no order from month {month} on, in alphabetical order.",
                "SELECT name FROM customers WHERE id NOT IN "
                f"(SELECT customer_id FROM orders WHERE month >= {month}) ORDER BY name", ordered=True)


def largest(rng: random.Random, language: str) -> dict[str, Any]:
    """The k largest orders of each city."""
    del language
    k = rng.randint(1, 3)
    return _row(
        rng, f"for each city the {k} orders with the largest amounts (of equal ones those with the smaller id), as city, id "
        "of the order and amount, by city and then from the largest amount down.",
        "SELECT city, id, amount FROM (SELECT c.city, o.id, o.amount, ROW_NUMBER() OVER (PARTITION BY c.city "
        "ORDER BY o.amount DESC, o.id) AS place FROM orders o JOIN customers c ON c.id = o.customer_id) "
        f"WHERE place <= {k} ORDER BY city, amount DESC, id", ordered=True)


FAMILIES = (spenders, idle, largest)
