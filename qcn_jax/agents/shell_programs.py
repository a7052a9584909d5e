"""Programs that a reader of shell texts must know: those that run others, and those whose output it can foretell."""

import base64
import binascii
import codecs
import contextlib
import fnmatch
import os
import re
from collections.abc import Sequence

UNKNOWN = "\ue000"  # stands in a word for what cannot be told: a character of nobody's, which a parser takes
# Programs that run the words behind them, and which of their options take a value.
_WRAPPERS = {
    "env": ("-u", "-C", "-S", "--unset", "--chdir"), "command": (), "builtin": (), "exec": ("-a",), "nohup": (),
    "setsid": (),
    "time": ("-f", "-o"), "timeout": ("-k", "-s", "--signal", "--kill-after"), "nice": ("-n",), "ionice": ("-c", "-n"),
    "stdbuf": ("-i", "-o", "-e"), "sudo": ("-u", "-g"), "doas": ("-u",), "busybox": (), "unbuffer": (), "chronic": (),
    "xargs": ("-n", "-I", "-P", "-L", "-d", "-a", "-E", "-s"), "strace": ("-o", "-e"), "watch": ("-n",), "coproc": (),
}  # fmt: skip
# What a pattern in the place of a program may stand for.
NETWORK = ("git", "gh", "curl", "wget", "aria2c", "nc", "ncat", "telnet", "ssh", "scp", "rsync", "ftp", "pip", "pip3",
           "uv", "npm", "go", "sh", "bash", "python", "python3")  # fmt: skip
_GIT_VALUES = ("-C", "-c", "--git-dir", "--work-tree", "--namespace", "--exec-path", "--config-env", "--super-prefix")
_PIP_VALUES = ("--proxy", "--cache-dir", "--log", "--timeout", "--retries", "--trusted-host", "--cert", "--client-cert",
               "--python", "--exists-action", "--keyring-provider", "--use-feature", "--use-deprecated")  # fmt: skip


def program(word: str) -> str:
    """The name of a program, without its folder and, for a pattern, of the first network program that it matches."""
    name = os.path.basename(word.rstrip("/")) or word
    if re.search(r"[*?\[]", name):
        return next((known for known in NETWORK if fnmatch.fnmatchcase(known, name)), name)
    return name


def unwrap(words: Sequence[str], stdin: str) -> list[str] | None:
    """The command that the wrapper `words` runs, or None where `words` is no wrapper."""
    name, rest = program(words[0]), list(words[1:])
    if name not in _WRAPPERS:
        return None
    replaced = ""
    while rest and (rest[0].startswith("-") or (name in ("env", "sudo") and re.match(r"\w+=", rest[0]))):
        option = rest.pop(0)
        if option == "--":
            break
        if name == "env" and option in ("-S", "--split-string") and rest:
            rest[:1] = rest[0].split()
        elif option in _WRAPPERS[name] and rest:
            value = rest.pop(0)
            replaced = value if option == "-I" else replaced
        elif name == "xargs" and option.startswith("-I"):
            replaced = option[2:]
    if name == "timeout":
        rest = rest[1:]
    if name == "xargs" and rest:
        return [word.replace(replaced, stdin.strip()) for word in rest] if replaced else [*rest, *stdin.split()]
    return rest


def plain(words: Sequence[str]) -> str:
    """A command as one line in which rules can look for it: options before git's and pip's subcommands are left out."""
    name, rest = words[0], list(words[1:])
    if re.fullmatch(r"python[\d.]*|pypy[\d.]*", name):
        at = next((i for i, word in enumerate(rest) if word == "-m" or word.startswith("-mpip")), None)
        if at is not None and all(word.startswith("-") for word in rest[:at]):
            module = rest[at][2:] or next(iter(rest[at + 1:]), "")
            rest = rest[at + (1 if rest[at] != "-m" else 2):]
            name = module.split(".")[0]
    if re.fullmatch(r"pip[\d.]*", name):
        return " ".join(["pip", *_behind(rest, _PIP_VALUES)])
    if name == "git":
        behind = _behind(rest, _GIT_VALUES)
        for alias in re.findall(r"(?m)^alias\.([\w-]+)=(.*)$", "\n".join(rest)):
            if behind and behind[0] == alias[0]:
                behind[:1] = [alias[1]]
                if alias[1].startswith("!"):
                    return " ".join([alias[1][1:], *behind[1:]])
        return " ".join([name, *behind])
    return " ".join([name, *rest])


def _behind(words: list[str], with_value: Sequence[str]) -> list[str]:
    """`words` from the first that is no option on."""
    at = 0
    while at < len(words) and words[at].startswith("-"):
        at += 2 if words[at] in with_value else 1
    return words[at:]


def escapes(text: str) -> str:
    """A text with backslash sequences replaced, as in $'...' and printf."""
    text = re.sub(r"\\0?([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
    with contextlib.suppress(UnicodeDecodeError):
        return codecs.decode(text.encode("latin-1", "backslashreplace"), "unicode_escape")
    return text


def printed(name: str, words: Sequence[str], stdin: str) -> str:
    """What a program prints, UNKNOWN where that cannot be told."""
    if name == "echo":
        options = [word for word in words[:3] if re.fullmatch(r"-[neE]+", word)]
        text = " ".join(words[len(options):])
        return (escapes(text) if any("e" in option for option in options) else text) + "\n"
    if name == "printf" and words:
        values = iter(words[1:])
        text = re.sub(r"%[sbdq]", lambda _: next(values, ""), escapes(words[0]))
        return text.replace("%%", "%")
    if name == "base64" and {"-d", "-D", "--decode", "-di"} & set(words):
        return decoded(stdin) or UNKNOWN
    if name == "xxd" and "-r" in words:
        with contextlib.suppress(ValueError):
            return bytes.fromhex("".join(stdin.split())).decode("utf-8", "replace")
    if name == "rev":
        return "\n".join(line[::-1] for line in stdin.split("\n"))
    if name == "tr" and len(words) == 2 and not words[0].startswith("-"):
        before, after = map(_characters, words)
        if before and after:
            after += after[-1] * (len(before) - len(after))
            return stdin.translate({ord(a): b for a, b in zip(before, after)})
    return UNKNOWN


def _characters(pattern: str) -> str:
    """The characters that one of tr's sets stands for."""
    def between(found: re.Match[str]) -> str:
        return "".join(map(chr, range(ord(found[1]), ord(found[2]) + 1)))
    return re.sub(r"(.)-(.)", between, escapes(pattern))


def decoded(text: str) -> str:
    """What base64 stands for, if it is readable text."""
    packed = "".join(text.split())
    try:
        found = base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True).decode()
    except (binascii.Error, ValueError):
        return ""
    return found if all(character.isprintable() or character.isspace() for character in found) else ""


def hidden(code: str) -> list[str]:
    """What long literals in a program's text stand for, if they are base64 of readable text."""
    return [text for literal in re.findall(r"[A-Za-z0-9+/]{16,}={0,2}", code) if (text := decoded(literal))]
