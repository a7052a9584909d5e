"""What a shell command would run, as far as reading it can tell: the words of its commands, without running any.

Bash's grammar is tree-sitter's. On its tree this follows quotes, literal variables, functions, aliases, braces, here
documents, files that the text itself writes, wrappers (env, xargs, timeout, ...), and texts that are handed to another
shell, also through echo, printf, base64, rev, tr and xxd. Not seen are values that come from anywhere else (files,
the environment, other programs' output, arithmetic, substrings) and what programs in other languages do; a program
whose name depends on such a value is counted as unseen.
"""

import dataclasses
import os
import re
import shlex

import tree_sitter
import tree_sitter_bash

from qcn_jax.agents import shell_programs
from qcn_jax.agents.shell_programs import UNKNOWN

MAX_STEPS, MAX_DEPTH, MAX_TEXT = 5000, 12, 20_000  # an agent's text must not cost more than this
_PARSER = tree_sitter.Parser(tree_sitter.Language(tree_sitter_bash.language()))
_BRACES = re.compile(r"^([^{}]*)\{([^{}]*,[^{}]*)\}([^{}]*)$", re.DOTALL)
# What the grammar takes for a block.
_BRACES_FIRST = re.compile(r"(?m)((?:^|[;&|(])[ \t]*)\{([^\s{};]*,[^\s{};]*)\}")
_DEVICE = re.compile(r"/dev/(?:tcp|udp)/")
_EXPANDED = ("simple_expansion", "expansion", "command_substitution", "arithmetic_expansion", "string")
SHELLS = ("sh", "bash", "dash", "ash", "zsh", "ksh")


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: its words, expanded, the program without its folder first; and what it reads, where known."""

    words: tuple[str, ...]
    stdin: str = ""


@dataclasses.dataclass(frozen=True)
class Reading:
    """The commands of a text, in order, and whether one may have stayed hidden."""

    commands: tuple[Command, ...]
    unseen: bool


class _Enough(Exception):
    """The text takes more work than it is worth."""


def read(text: str) -> Reading:
    """Reads a shell text; a text that is too long or too deeply nested is unseen from there on."""
    reader = _Reader()
    try:
        reader.text(text)
    except (_Enough, RecursionError):
        reader.unseen = True
    return Reading(tuple(reader.commands), reader.unseen)


class _Reader:
    """Walks a syntax tree; every `run` of a node gives what it would print, with UNKNOWN for what cannot be told."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.unseen = False
        self._variables = {"IFS": " "}
        self._aliases: dict[str, str] = {}
        self._functions: dict[str, tree_sitter.Node] = {}
        self._files: dict[str, str] = {}
        self._arguments: list[str] = [UNKNOWN]
        self._steps = self._depth = 0

    def text(self, text: str, stdin: str = "") -> str:
        """Runs a text."""
        if len(text) > MAX_TEXT:
            raise _Enough
        text = _BRACES_FIRST.sub(lambda found: found[1] + found[2].replace(",", " "), text)
        root = _PARSER.parse(text.encode("utf-8", "replace")).root_node
        self.unseen = self.unseen or root.has_error
        return self._deeper(root, stdin)

    def _deeper(self, node: tree_sitter.Node, stdin: str) -> str:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _Enough
        printed = self.run(node, stdin)
        self._depth -= 1
        return printed

    def run(self, node: tree_sitter.Node, stdin: str = "") -> str:
        """What a statement prints."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise _Enough
        special = getattr(self, f"_run_{node.type}", None)
        if special is not None:
            return special(node, stdin)
        return "".join(self.run(child, stdin) for child in node.named_children)

    # --- statements

    def _run_comment(self, node: tree_sitter.Node, stdin: str) -> str:
        return ""

    def _run_pipeline(self, node: tree_sitter.Node, stdin: str) -> str:
        for child in node.named_children:
            stdin = self.run(child, stdin)
        return stdin

    def _run_variable_assignment(self, node: tree_sitter.Node, stdin: str) -> str:
        name, value = node.child_by_field_name("name"), node.child_by_field_name("value")
        if name is not None:
            self._variables[_source(name)] = " ".join(self.words(value)) if value is not None else ""
        return ""

    def _run_function_definition(self, node: tree_sitter.Node, stdin: str) -> str:
        name, body = node.child_by_field_name("name"), node.child_by_field_name("body")
        if name is not None and body is not None:
            self._functions[_source(name)] = body
        return ""

    def _run_for_statement(self, node: tree_sitter.Node, stdin: str) -> str:
        variable, body = node.child_by_field_name("variable"), node.child_by_field_name("body")
        values = [word for value in node.children_by_field_name("value") for word in self.words(value)] or [UNKNOWN]
        printed = ""
        for value in values:
            if variable is not None:
                self._variables[_source(variable)] = value
            printed += self.run(body, stdin) if body is not None else ""
        return printed

    def _run_redirected_statement(self, node: tree_sitter.Node, stdin: str) -> str:
        body, redirects = node.child_by_field_name("body"), node.children_by_field_name("redirect")
        after, targets = [], []
        for redirect in redirects:
            text, following = self._redirect(redirect, targets)
            stdin, after = stdin if text is None else text, after + following
        printed = self.run(body, stdin) if body is not None else ""
        for path in targets:
            self._files[os.path.normpath(path)] = printed
        for following in after:
            printed = self.run(following, printed)
        return printed

    def _redirect(self, node: tree_sitter.Node, targets: list[str]) -> tuple[str | None, list[tree_sitter.Node]]:
        """What is read because of a redirection, and the statements that stand behind it; adds files written."""
        if node.type == "heredoc_redirect":
            body = next((child for child in node.named_children if child.type == "heredoc_body"), None)
            start = next((child for child in node.named_children if child.type == "heredoc_start"), None)
            literal = start is None or re.search(r"[\"'\\]", _source(start))
            text = "" if body is None else _source(body) if literal else self._inner(body)
            kinds = ("command", "pipeline", "redirected_statement", "list")
            return text, [child for child in node.named_children if child.type in kinds]
        words = [word for child in node.named_children if child.type != "file_descriptor" for word in self.words(child)]
        if node.type == "herestring_redirect":
            return " ".join(words) + "\n", []
        for word in words:
            if _DEVICE.match(word):
                self.commands.append(Command((word,)))
        if words and any(child.type == "<" for child in node.children):
            return self._files.get(os.path.normpath(words[0]), UNKNOWN), []
        targets += words
        return None, []

    # --- words

    def words(self, node: tree_sitter.Node) -> list[str]:
        """The fields that a word becomes."""
        fields, quoted = [""], False
        for text, splits in self._parts(node):
            quoted = quoted or not splits
            pieces = re.split(r"[ \t\n]+", text) if splits else [text]
            fields[-1] += pieces[0]
            fields += pieces[1:]
            if sum(map(len, fields)) > MAX_TEXT:
                raise _Enough
        fields = [field for field in fields if field or (quoted and len(fields) == 1)]
        if "{" in _source(node) and node.type in ("word", "concatenation"):
            fields = [word for field in fields for word in _braces(field)]
        return fields

    def _parts(self, node: tree_sitter.Node) -> list[tuple[str, bool]]:
        """Pieces of a word, and whether white space in them separates fields."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise _Enough
        kind, source = node.type, _source(node)
        if kind == "raw_string":
            return [(source[1:-1], False)]
        if kind == "ansi_c_string":
            return [(shell_programs.escapes(source[2:-1]), False)]
        if kind in ("string", "translated_string"):
            return [(self._inner(node), False)]
        if kind in ("concatenation", "command_name", "array"):
            return [part for child in node.named_children for part in self._parts(child)]
        if kind == "command_substitution":
            return [("".join(self.run(child) for child in node.named_children).rstrip("\n"), True)]
        if kind == "process_substitution":
            path = f"/dev/fd/{60 + len(self._files)}"
            self._files[path] = "".join(self.run(child) for child in node.named_children)
            return [(path, False)]
        if kind in ("simple_expansion", "expansion"):
            return [(self._expansion(node), True)]
        if kind == "arithmetic_expansion":
            return [(UNKNOWN, False)]
        return [(re.sub(r"\\(\n|.)", lambda found: found[1].strip("\n"), source, flags=re.DOTALL), False)]

    def _inner(self, node: tree_sitter.Node) -> str:
        """The text between double quotes, or of a here document: what no child covers stands as it is written."""
        source, at, text = node.text or b"", 0, ""
        for child in node.children:
            start = child.start_byte - node.start_byte
            text += source[at:start].decode("utf-8", "replace")
            at = child.end_byte - node.start_byte
            if child.type in _EXPANDED:
                text += "".join(part for part, _ in self._parts(child))
            elif child.type not in ('"', "$"):
                text += re.sub(r"\\([\"$`\\\n])", lambda found: found[1].strip("\n"), _source(child))
        return text + source[at:].decode("utf-8", "replace")

    def _expansion(self, node: tree_sitter.Node) -> str:
        source = _source(node).removeprefix("$")
        name = source.strip("{}").split(":")[0].split("-")[0]
        if name in ("@", "*"):
            return " ".join(self._arguments)
        if name.isdecimal():
            number = int(name) - 1
            return self._arguments[number] if 0 <= number < len(self._arguments) else UNKNOWN
        if source.strip("{}") == name:
            return self._variables.get(name, UNKNOWN)
        default = re.match(r"\{\w+:?-", source)
        if default and name not in self._variables:
            return "".join(word for child in node.named_children[1:] for word in self.words(child))
        return self._variables.get(name, UNKNOWN) if default else UNKNOWN

    # --- commands

    def _run_command(self, node: tree_sitter.Node, stdin: str) -> str:
        words: list[str] = []
        targets: list[str] = []
        named = node.child_by_field_name("name") is not None
        for child in node.named_children:
            if child.type == "variable_assignment":
                value = child.child_by_field_name("value")
                if not named:
                    self.run(child)
                elif value is not None:
                    self.words(value)
            elif child.type.endswith("_redirect"):
                text, _ = self._redirect(child, targets)
                stdin = stdin if text is None else text
            else:
                words += self.words(child)
        return self._call(words, stdin) if words else ""

    def _call(self, words: list[str], stdin: str) -> str:
        """Runs a command that consists of `words`."""
        first, rest = words[0], words[1:]
        if first in self._aliases:
            alias = self._aliases.pop(first)
            return self._nested(f"{alias} {shlex.join(rest)}", stdin)
        if first in self._functions:
            before, self._arguments = self._arguments, rest
            printed = self._deeper(self._functions[first], stdin)
            self._arguments = before
            return printed
        wrapped = shell_programs.unwrap(words, stdin)
        if wrapped is not None:
            self.commands.append(Command(tuple(words[:1])))
            return self._call(wrapped, stdin) if wrapped else ""
        program = shell_programs.program(first)
        self.unseen = self.unseen or UNKNOWN in first
        self.commands.append(Command((program, *rest), stdin))
        if program in ("eval", "source", ".", *SHELLS):
            return self._shell(program, first, rest, stdin)
        if os.path.normpath(first) in self._files:
            return self._nested(self._files[os.path.normpath(first)], stdin)
        if program == "alias":
            self._aliases.update(word.split("=", 1) for word in rest if "=" in word)
        elif program in ("read", "mapfile") and stdin:
            names = [word for word in rest if not word.startswith("-")]
            self._variables.update(zip(names, stdin.split(None, max(0, len(names) - 1))))
        elif program == "set" and "--" in rest:
            self._arguments = rest[rest.index("--") + 1:]
        elif program in ("cat", "tee"):
            known = [self._files.get(os.path.normpath(word), UNKNOWN) for word in rest if not word.startswith("-")]
            if program == "tee":
                self._files.update((os.path.normpath(word), stdin) for word in rest if not word.startswith("-"))
                return stdin
            return "".join(known) or stdin
        return shell_programs.printed(program, rest, stdin)

    def _shell(self, program: str, first: str, rest: list[str], stdin: str) -> str:
        """A program that runs a text as shell commands."""
        if program == "eval":
            return self._nested(" ".join(rest), stdin)
        if program in SHELLS:
            while rest and rest[0].startswith(("-", "+")):
                option, rest = rest[0], rest[1:]
                if not option.startswith("--") and "c" in option and rest:
                    before, self._arguments = self._arguments, rest[2:]
                    printed = self._nested(rest[0], stdin)
                    self._arguments = before
                    return printed
                if option in ("-o", "-O", "--rcfile", "--init-file"):
                    rest = rest[1:]
        if rest and rest[0] not in ("/dev/stdin", "-"):
            return self._nested(self._files[os.path.normpath(rest[0])], stdin) \
                if os.path.normpath(rest[0]) in self._files else UNKNOWN  # a script of the repository
        return self._nested(stdin, "") if stdin else ""

    def _nested(self, text: str, stdin: str) -> str:
        """Runs a text; one that is not known at all is unseen."""
        if not text.strip(UNKNOWN + " \n"):
            self.unseen = self.unseen or UNKNOWN in text
            return UNKNOWN
        return self.text(text, stdin)


def _source(node: tree_sitter.Node) -> str:
    return (node.text or b"").decode("utf-8", "replace")


def _braces(field: str) -> list[str]:
    """Words of a field with one pair of braces in it."""
    found = _BRACES.match(field)
    return [found[1] + choice + found[3] for choice in found[2].split(",")] if found else [field]
