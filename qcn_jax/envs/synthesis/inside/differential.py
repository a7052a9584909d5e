"""Runs inside a sandbox: what functions give for literal arguments.

Sent as text to Sandbox.run_python, which provides `ROOT`. Only results that can be written down again count.
"""

import ast
import builtins
import copy
import importlib
import inspect
import itertools
import os
import signal
import sys
import types

ROOT: str
Watch = globals().get("Watch")  # of clocks.py

SECONDS = 0.25  # of processor time for one call
LONGEST = 400  # characters of a result
ITEMS = 50  # of a generator


class OutOfTime(BaseException):
    """A call took too long."""


def stop(*_):
    raise OutOfTime


def main(wanted):
    """For each {path, function, arguments}: [module, expression, returned or raised, text], or None."""
    signal.signal(signal.SIGPROF, stop)
    return [outcome(call) for call in wanted]


def module_name(path):
    """The name under which a file is imported, by the module search path."""
    full = os.path.join(ROOT, path)
    places = sorted((os.path.abspath(place or ROOT) for place in sys.path), key=len, reverse=True)
    for place in places:
        if full.startswith(place + os.sep):
            parts = full[len(place) + 1:-len(".py")].split(os.sep)
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return None


def outcome(call):
    """What one call gave, twice the same."""
    try:
        name = module_name(call["path"])
        function = getattr(importlib.import_module(name), call["function"])
        values = {key: ast.literal_eval(text) for key, text in call["arguments"].items()}
        expression, positional, named = bind(f"{name}.{call['function']}", function, values)
        first = attempt(function, positional, named)
        if first is None or first != attempt(function, positional, named):
            return None
        return [name, f"list({expression})" if first[0] == "yielded" else expression,
                "returned" if first[0] == "yielded" else first[0], first[1]]
    except (Exception, SystemExit):
        return None


def bind(name, function, values):
    """The call as text, and its positional and named arguments."""
    texts, positional, named = [], [], {}
    for parameter in inspect.signature(function).parameters.values():
        value = values[parameter.name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += value
            texts += map(repr, value)
        elif parameter.kind is parameter.VAR_KEYWORD:
            named.update(value)
            texts += [f"{key}={item!r}" for key, item in value.items()]
        elif parameter.kind is parameter.KEYWORD_ONLY:
            named[parameter.name] = value
            texts.append(f"{parameter.name}={value!r}")
        else:
            positional.append(value)
            texts.append(repr(value))
    return f"{name}({', '.join(texts)})", positional, named


def attempt(function, positional, named):
    """(outcome, text) of a call on copies of its arguments, or None."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with Watch() as watch:
            result = function(*copy.deepcopy(positional), **copy.deepcopy(named))
            kind = "returned"
            if isinstance(result, types.GeneratorType):
                kind, result = "yielded", list(itertools.islice(result, ITEMS + 1))
        return None if watch.asked or kind == "yielded" and len(result) > ITEMS else written(kind, result)
    except OutOfTime:
        return None
    except (RecursionError, MemoryError):  # what comes depends on how much is in use around the call
        return None
    except Exception as error:
        known = getattr(builtins, type(error).__name__, None) is type(error)
        return ("raised", type(error).__name__) if known and not watch.asked else None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def written(kind, result):
    """(kind, the result as a literal), or None where it has none."""
    try:
        text = repr(result)
        return (kind, text) if len(text) <= LONGEST and ast.literal_eval(text) == result else None
    except Exception:  # of the attempt to write it, not of the function
        return None
