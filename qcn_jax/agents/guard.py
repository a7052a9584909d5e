"""The report's blocker: a tool call that reaches for the repository on the network is refused and the agent told so.

The report (arXiv 2603.00729) found agents that re-added the remote and fetched the fix, and blocks any tool call that
holds both a repository link and a network keyword. Rules here are data: a policy lists them and more can be added. Of
shell commands the words are judged, after quotes, variables and the like (`agents.shell_reader`). What keeps agents
from the network is the sandbox, whatever a policy says, and a command can be disguised beyond what any reader sees;
the guard saves the attempt's turns and counts the attempts, and the calls that it could not see through ("unseen").
"""

import collections
import dataclasses
import re
import threading
from collections.abc import Iterable, Mapping

from qcn_jax.agents import shell_programs, shell_reader

LINK = re.compile(
    r"(?:https?|git|ssh)://|git@[\w.-]+:|\bwww\.|\b(?:github|gitlab|bitbucket|codeberg|sourceforge|gitee)\.(?:com|org|io)\b|"
    r"\b(?:raw\.githubusercontent|pypi|pythonhosted|files\.pythonhosted)\.(?:com|org)\b", re.IGNORECASE)
NETWORK_WORD = re.compile(
    r"\b(?:git\s+(?:clone|fetch|pull|remote|ls-remote|submodule)|gh\s+\w+|curl|wget|aria2c|lynx|w3m|nc|ncat|telnet|ssh|scp|"
    r"rsync|ftp|pip3?|uv|conda|easy_install|urllib\d?|urlopen|requests|httpx|aiohttp|http\.client|socket|fetch|download)\b",
    re.IGNORECASE)
SHELL_ARGUMENT = "command"  # what scaffolds call the text that their tool hands to a shell


@dataclasses.dataclass(frozen=True)
class Rule:
    """Blocks a call in whose text every one of `patterns` is found.

    Attributes:
      commands: only single commands are looked at, as `shell_programs.plain` writes them; otherwise all the call's text
        and its commands.
    """

    name: str
    patterns: tuple[re.Pattern[str], ...]
    message: str
    commands: bool = False

    def matches(self, text: str, commands: Iterable[str] = ()) -> bool:
        """Whether the rule applies to a call's text or to one of its commands."""
        if self.commands:
            return any(all(pattern.search(command) for pattern in self.patterns) for command in commands)
        whole = "\n".join([text, *commands])
        return all(pattern.search(whole) for pattern in self.patterns)


REPORT_RULE = Rule(
    "repository_link", (LINK, NETWORK_WORD),
    "This call was blocked: it combines a link to a repository with a network operation. Solve the task with the files "
    "that are there.")
INSTALL_RULE = Rule(
    "package_download", (re.compile(
        r"^(?:pip (?:install|download|wheel)|pipx (?:install|run)|"
        r"uv (?:-\S+ )*(?:(?:pip|tool) )?(?:-\S+ )*(?:install|add|sync)|"
        r"(?:conda|mamba) (?:-\S+ )*(?:install|create|update)|easy_install|go (?:get|install|mod download)|"
        r"(?:npm|pnpm|yarn) (?:-\S+ )*(?:install|i|add|ci|pack))(?![\w-])"),),
    "This call was blocked: packages cannot be downloaded. Everything the tests need is installed.", commands=True)
REMOTE_RULE = Rule(
    "git_remote", (re.compile(r"^git (?:remote (?:\S+ )*?(?:add|set-url)|fetch|pull|clone|ls-remote|"
                              r"submodule (?:\S+ )*?(?:add|update))(?![\w-])"),),
    "This call was blocked: the repository has no remotes and none can be reached.", commands=True)
DEVICE_RULE = Rule(
    "network_device", (re.compile(r"^/dev/(?:tcp|udp)/"),),
    "This call was blocked: it opens a network connection through the shell.", commands=True)
RULES = (REPORT_RULE, REMOTE_RULE, INSTALL_RULE, DEVICE_RULE)


def rules_for(network: str) -> tuple[Rule, ...]:
    """The rules where agents' sandboxes have this network (network.policy.NETWORKS); with one, packages may come."""
    return RULES if network == "none" else tuple(rule for rule in RULES if rule is not INSTALL_RULE)


class Guard:
    """A policy and the count of what it blocked; safe for threads."""

    def __init__(self, rules: Iterable[Rule] = RULES):
        self.rules = tuple(rules)
        self.counts: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def extended(self, *rules: Rule) -> "Guard":
        """A new guard with further rules."""
        return Guard((*self.rules, *rules))

    def add(self, requests: Mapping[str, int]) -> None:
        """Counts what came of requests to the network while a call ran (`ExecResult.network`)."""
        with self._lock:
            self.counts.update({f"network/{name}": count for name, count in requests.items()})

    def check(self, tool: str, arguments: Mapping[str, object]) -> Rule | None:
        """The rule by which the call must not be made, or None; looks at all argument values together."""
        text = "\n".join([tool, *(str(value) for value in arguments.values())])
        shell = arguments.get(SHELL_ARGUMENT)
        reading = shell_reader.read(shell) if isinstance(shell, str) else shell_reader.Reading((), False)
        commands = [line for command in reading.commands for line in _lines(command)]
        broken = next((rule for rule in self.rules if rule.matches(text, commands)), None)
        with self._lock:
            if reading.unseen:
                self.counts["unseen"] += 1
            if broken is None:
                self.counts["allowed"] += 1
                return None
            self.counts["blocked"] += 1
            self.counts[f"blocked/{broken.name}"] += 1
        return broken


def _lines(command: shell_reader.Command) -> list[str]:
    """A command for rules, and what is hidden in programs of other languages that it is handed."""
    line = shell_programs.plain(command.words)
    return [line, *shell_programs.hidden(f"{line}\n{command.stdin}")]
