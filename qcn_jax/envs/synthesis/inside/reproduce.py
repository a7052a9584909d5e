"""Runs inside a sandbox: short programs that repeat recorded calls, and what they give in the present state.

Sent as text to Sandbox.run_python, which provides `ROOT`. A program is what somebody would write into an issue:
imports, and an expression. Only those are given back that run, and give the same twice.
"""

import ast
import builtins
import importlib
import inspect
import itertools
import os
import re
import reprlib
import signal
import sys

ROOT: str
Watch = globals().get("Watch")  # of clocks.py

SECONDS = 0.5  # of processor time for one program
LONGEST = 300  # characters of what a program gives
ITEMS = 50  # of a generator
# Where names come from that values print without their module.
HOMES = {"Decimal": "decimal", "Fraction": "fractions", "OrderedDict": "collections", "defaultdict": "collections",
         "Counter": "collections", "deque": "collections", "UUID": "uuid", "PosixPath": "pathlib", "Path": "pathlib",
         "StringIO": "io", "BytesIO": "io"}


class OutOfTime(BaseException):
    """A program took too long."""


def stop(*_):
    raise OutOfTime


def main(wanted):
    """For each {path, name, args, kinds, built, yields, shows}, or {program}: [program, verb, text], or None."""
    signal.signal(signal.SIGPROF, stop)
    return [reproduced(call) for call in wanted]


def reproduced(call):
    """What one call gives when it is repeated."""
    try:
        lines = call["program"].split("\n") if "program" in call else program(call)
        # Modules that are loaded for the first time take long, and may ask for the time.
        exec("\n".join(line for line in lines if line.startswith(("from ", "import "))), {})
        first = attempt(lines)
        return ["\n".join(lines), *first] if first is not None and first == attempt(lines) else None
    except (Exception, SystemExit, OutOfTime):
        return None


def module_name(path):
    """The name under which a file is imported, by the module search path."""
    full = os.path.join(ROOT, path)
    places = sorted((os.path.abspath(place or ROOT) for place in sys.path), key=len, reverse=True)
    for place in places:
        if full.startswith(place + os.sep):
            parts = full[len(place) + 1:-len(".py")].split(os.sep)
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    raise ImportError(path)


def program(call):
    """Lines of a program, the last one an expression."""
    home = importlib.import_module(module_name(call["path"]))
    first, *rest = call["name"].split(".")
    arguments, before = list(zip(call["args"], call["kinds"], strict=True)), []
    target = getattr(home, first)
    for part in rest:
        target = getattr(target, part)
    imports, bound = set(), arguments[0][0][0] if rest and arguments else ""
    if bound == "self":
        kind, given, how = call["built"]
        first = kind.split(".")[0]  # a class that inherits the method
        owner = getattr(home, first)
        expression = written(home, imports, kind, list(zip(given, how, strict=True)), defaults(owner))
        arguments = arguments[1:]
        if call["shows"] == "self":
            before, expression = [f"it = {expression}"], "it"
        expression = expression if rest[-1] == "__init__" else f"{expression}.{rest[-1]}"
    else:
        arguments = arguments[bound == "cls":]
        expression = call["name"]
    imports.add(f"from {nearest(home, first)} import {first}")
    if isinstance(target, property) or bound == "self" and rest[-1] == "__init__":
        return [*sorted(imports), *before, expression]
    if call["shows"] and call["shows"] != "self":
        name, texts = call["shows"], dict(pair for pair, _ in arguments)
        before.append(f"{name} = {checked(home, imports, texts[name])}")
        arguments = [((key, name if key == name else text), how) for (key, text), how in arguments]
    expression = written(home, imports, expression, arguments, defaults(target), call["shows"])
    if call["yields"]:
        expression = f"list({expression})"
    after = [] if not call["shows"] else ["vars(it)" if call["shows"] == "self" else call["shows"]]
    return [*sorted(imports), *before, expression, *after]


def defaults(function):
    """What arguments have for defaults, as texts."""
    return {name: repr(parameter.default) for name, parameter in inspect.signature(function).parameters.items()
            if parameter.default is not parameter.empty}


def nearest(home, name):
    """The shortest module that has what `home` calls `name`."""
    value, parts = getattr(home, name), home.__name__.split(".")
    for length in range(1, len(parts)):
        module = sys.modules.get(".".join(parts[:length]))
        if module is not None and getattr(module, name, None) is value and not name.startswith("_"):
            return module.__name__
    return home.__name__


def written(home, imports, function, arguments, default, known=""):
    """A call as text, without arguments that are given their defaults; adds what it needs to `imports`."""
    texts, named = [], False
    for (name, text), kind in sorted(arguments, key=lambda argument: "-*=#".index(argument[1])):
        if default.get(name) == text and name != known:
            named = True  # those after it by name
            continue
        text = text if name == known else checked(home, imports, text)
        if kind in "*#":
            value = ast.parse(text, mode="eval").body
            if kind == "*":
                texts += map(ast.unparse, value.elts)
            else:
                texts += [f"{ast.literal_eval(key)}={ast.unparse(item)}" for key, item in zip(value.keys, value.values)]
        else:
            texts.append(f"{name}={text}" if kind == "=" or named else text)
    return f"{function}({', '.join(texts)})"


def checked(home, imports, text):
    """The text of a value, as an expression whose names are imported."""
    tree = ast.parse(text, mode="eval")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value is ...:
            raise ValueError("a text that was cut")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "..." in node.value:
            raise ValueError("a text that may have been cut")
        if isinstance(node, ast.Name) and not hasattr(builtins, node.id):
            if node.id in HOMES:
                imports.add(f"from {HOMES[node.id]} import {node.id}")
            elif hasattr(home, node.id) and not isinstance(getattr(home, node.id), type(sys)):
                imports.add(f"from {nearest(home, node.id)} import {node.id}")
            elif node.id in sys.stdlib_module_names:
                imports.add(f"import {node.id}")
            else:
                raise NameError(node.id)
    return text


def bounded(values=()):
    """`list` of at most ITEMS values."""
    found = builtins.list(itertools.islice(values, ITEMS + 1))
    if len(found) > ITEMS:
        raise OutOfTime
    return found


def attempt(lines):
    """(verb, text) of what a program's last line gives, or None."""
    names = {"__name__": "__main__"}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        names["list"] = bounded
        with Watch() as watch:
            exec("\n".join(lines[:-1]), names)
            value = shown(eval(lines[-1], names))
        return None if watch.asked else given("gives", value)
    except OutOfTime:
        return None
    except (RecursionError, MemoryError):  # what comes depends on how much is in use around the call
        return None
    except Exception as error:
        if watch.asked:
            return None
        text = str(error) if not isinstance(error, KeyError) else repr(error)[9:-1]
        return given("raises", f"{type(error).__name__}: {text.strip()}" if text else type(error).__name__)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def given(verb, text):
    """(verb, text), or None where the text is of no use outside of this process."""
    unreadable = re.search(r"0x[0-9a-fA-F]{4,}|<[\w.]+ object|\bat 0x", text) or os.path.dirname(ROOT) in text
    return None if unreadable or len(text) > LONGEST else (verb, text)


def shown(value):
    """A value as the interpreter shows it; objects without a representation of their own by their fields."""
    if type(value).__repr__ is object.__repr__:
        fields = ", ".join(f"{name}={reprlib.repr(item)}" for name, item in vars(value).items())
        return f"{type(value).__qualname__}({fields})"
    return repr(value)
