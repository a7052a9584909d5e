"""SWE-bench's own instances (release 5): run in their images, graded from their logs by their rules.

A row names an image, a script and a log parser. The patch is applied in a fresh container, the script run there, and
its output read: that is how these sets are defined, and the verdicts are those of the `swebench` package on the same
logs. What stands around it is ours: no network, no capabilities, memory, process, time and output limits, and
containers that a crashed run leaves are found by their label. Tasks of our own are graded by `envs.tasks.grading`,
which trusts no log.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

import docker
import docker.errors
import requests
import urllib3

from qcn_jax import files
from qcn_jax.envs import names
from qcn_jax.envs.patches import PatchError, check_size
from qcn_jax.envs.sandbox import docker as back_end
from qcn_jax.envs.sandbox import images
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.tasks import formats, log_parsers
from qcn_jax.envs.tasks.grading import INFRASTRUCTURE_ATTEMPTS
from qcn_jax.envs.tasks.log_parsers import swebench_logs
from qcn_jax.envs.tasks.schema import read_rows
from qcn_jax.envs.tasks.verdicts import Verdict
from qcn_jax.errors import UserError

START, END, EXIT_CODE = ">>>>> Start Test Output", ">>>>> End Test Output", ">>>>> Test Exit Code"
APPLY_FAILED = ">>>>> Patch Apply Failed"
INVALID = (APPLY_FAILED, ">>>>> Reset Failed", ">>>>> Tests Errored", ">>>>> Tests Timed Out")
PASS_AND_FAIL, FAIL_ONLY = "pass_and_fail", "fail_only"
TIMEOUT = 1800.0  # seconds, as in the package
MEMORY_MB, PROCESSES, LOG_BYTES = 8192, 1024, 200_000_000
PATCH_BYTES = 16_000_000
# What a runner prints when it has run something; without results and without such a line nothing was run.
_RAN = re.compile("|".join((
    r"Executed [1-9]\d* of \d+", r"TOTAL: [1-9]\d* (?:SUCCESS|FAILED)", r"[1-9]\d{0,9} passing", r"Tests:\s+[1-9]\d*",
    r"Test Suites:\s+(?:\d+ \w+, )*[1-9]\d* total", r"^# tests [1-9]\d*", r"[1-9]\d{0,9} specs?, \d+ failures?",
    r"': ok$")), re.MULTILINE)
# Ways to apply a patch, in the package's order; after a failure the tree is put back.
_APPLY = ("git apply --verbose", "git apply --verbose --3way", "git apply --verbose --reject",
          "patch --batch --forward --fuzz=5 -p1 -i")


@dataclasses.dataclass(frozen=True)
class Instance:
    """What of a row decides a verdict."""

    instance_id: str
    image: str
    eval_script: str
    log_parser: str
    eval_type: str
    FAIL_TO_PASS: tuple[str, ...]
    PASS_TO_PASS: tuple[str, ...]

    @classmethod
    def from_row(cls, row: Mapping[str, Any], where: str = "instance") -> "Instance":
        """Reads a row of release 5; raises UserError that names `where` and the field."""
        values: dict[str, Any] = {}
        for field in ("instance_id", "image", "eval_script", "log_parser", "eval_type"):
            if not isinstance(row.get(field), str) or not row[field]:
                raise UserError(f"{where}: field {field} is missing or not a string")
            values[field] = row[field]
        for field, fault in (("instance_id", names.id_fault), ("image", names.image_fault)):
            if words := fault(values[field]):
                raise UserError(f"{where}: field {field} {words}, got {names.shown(values[field])}")
        for field in ("FAIL_TO_PASS", "PASS_TO_PASS"):
            try:
                tests = json.loads(row[field]) if isinstance(row[field], str) else row[field]
                values[field] = tuple(map(str, tests))
            except (KeyError, ValueError, TypeError, RecursionError) as error:
                raise UserError(f"{where}: field {field} is not a list of tests") from error
        if values["eval_type"] not in (PASS_AND_FAIL, FAIL_ONLY):
            raise UserError(
                f"{where}: field eval_type: expected {PASS_AND_FAIL} or {FAIL_ONLY}, got {row['eval_type']!r}")
        log_parsers.parser(values["log_parser"])
        return cls(**values)

    def script(self) -> str:
        """The script, made to print the status of the tests' own command behind the end marker."""
        lines = self.eval_script.rstrip("\n").split("\n")
        for number, line in enumerate(lines):
            if END in line:
                lines[number:number + 1] = ["QCN_STATUS=$?", line, f'echo "{EXIT_CODE}: $QCN_STATUS"']
                break
        return "\n".join(lines) + "\n"


def read(path: str | os.PathLike[str], faults: list[str] | None = None) -> dict[str, Instance] | None:
    """Instances by id, or None where the file's first row is none of release 5; `faults` as in `formats.read`."""
    rows = [(number, row) for number, row in formats.numbered(path, faults) if isinstance(row, dict) or faults is None]
    if not rows or not isinstance(rows[0][1], dict) or formats.detect(rows[0][1]) != "swebench5":
        return None
    return {found.instance_id: found for found in read_rows(path, rows, Instance.from_row, faults)}


# --- grading


def read_log(instance: Instance, log: str) -> dict[str, str] | None:
    """{test: status} of a valid log; None where the patch did not apply, or nothing says that the tests were run."""
    if any(mark in log for mark in INVALID) or START not in log or END not in log:
        return None
    parse = log_parsers.parser(instance.log_parser)
    found = parse(log.split(START)[1].split(END)[0]) or parse(log)
    if not found and not _RAN.search(log):
        return None
    status = re.search(rf"{EXIT_CODE}:\s*(-?\d+)", log)
    failed = any(outcome in (swebench_logs.FAILED, swebench_logs.ERROR) for outcome in found.values())
    if status and int(status[1]) != 0 and found and not failed:
        return None  # the log does not tell of the run that was
    return found


def judge(instance: Instance, found: Mapping[str, str]) -> dict[str, dict[str, list[str]]]:
    """SWE-bench's tests_status: which expected tests did what they must."""
    report = {}
    for group, also in (("FAIL_TO_PASS", ()), ("PASS_TO_PASS", (swebench_logs.SKIPPED,))):
        success, failure = [], []
        for test in getattr(instance, group):
            if instance.eval_type == FAIL_ONLY:
                (failure if found.get(test) == swebench_logs.FAILED else success).append(test)
                continue
            outcome = _outcome(test, found)
            if outcome in (swebench_logs.PASSED, swebench_logs.XFAIL, *also):
                success.append(test)
            elif outcome is None or outcome in (swebench_logs.FAILED, swebench_logs.ERROR, swebench_logs.SKIPPED):
                failure.append(test)
            # Else a parser took a word like "ERROR:" for a status: the package counts such a test nowhere.
        report[group] = {"success": success, "failure": failure}
    return report


def _outcome(test: str, found: Mapping[str, str]) -> str | None:
    """A test's status; published ids that are cut off within their parameters stand for all that begin so."""
    if test in found or test.count("[") <= test.count("]"):
        return found.get(test)
    outcomes = [status for name, status in found.items() if name.startswith(test)]
    agree = len({status in (swebench_logs.PASSED, swebench_logs.XFAIL) for status in outcomes}) == 1
    return outcomes[0] if agree else None


def verdict(instance: Instance, log: str, seconds: float = 0.0) -> Verdict:
    """The verdict that a log means by SWE-bench's rules."""
    found = read_log(instance, log)
    if found is None:
        outcome = "patch_failed" if APPLY_FAILED in log else "unresolved"
        return Verdict(instance.instance_id, outcome, seconds=seconds, detail="the log holds no valid run of the tests")
    status = judge(instance, found)
    good = not any(group["failure"] for group in status.values())
    return Verdict(instance.instance_id, "resolved" if good else "unresolved", status, seconds)


# --- running


def run(client: docker.DockerClient, instance: Instance, patch: str, timeout: float = TIMEOUT,
        skip_patch: bool = False) -> tuple[Verdict, str]:
    """Applies a patch in a fresh container of the instance's image and runs its script; returns verdict and log.

    Failures of the engine are tried again and then make the outcome "infrastructure".
    """
    if not patch.strip() and not skip_patch:
        return Verdict(instance.instance_id, "empty_patch"), ""
    try:
        check_size(patch, PATCH_BYTES)
    except PatchError as error:
        return Verdict(instance.instance_id, "patch_failed", detail=str(error)), ""
    started = time.monotonic()
    for attempt in range(INFRASTRUCTURE_ATTEMPTS):
        try:
            log, ended = _run(client, instance, None if skip_patch else patch, timeout)
            break
        except (SandboxError, docker.errors.DockerException, OSError) as error:
            if attempt == INFRASTRUCTURE_ATTEMPTS - 1:
                text = str(error).split("\n")[0][:300]
                return Verdict(instance.instance_id, "infrastructure", detail=text), ""
            time.sleep(0.5 * 4**attempt)
    seconds = time.monotonic() - started
    if ended:
        return Verdict(instance.instance_id, ended, seconds=seconds), log
    return verdict(instance, log, seconds), log


def _run(client: docker.DockerClient, instance: Instance, patch: str | None, timeout: float) -> tuple[str, str]:
    """(log, why it ended early: "", timeout, out_of_memory or killed)."""
    api = client.api
    image = images.base_image(client, instance.image)
    host = api.create_host_config(
        init=True, network_mode="none", ipc_mode="private", cap_drop=["ALL"], security_opt=["no-new-privileges"],
        mem_limit=f"{MEMORY_MB}m", memswap_limit=f"{MEMORY_MB}m", pids_limit=PROCESSES, log_config={"Type": "none"})
    limit = max(1, round(timeout))
    # The limit stands inside, where it ends all that runs; the host only waits a little longer.
    command = ["timeout", "-s", "KILL", str(limit), "/bin/bash", "/qcn/run.sh"]
    made = api.create_container(image, command, entrypoint=[], user="0:0", working_dir="/testbed", host_config=host,
                                labels={back_end.OWNER: back_end.owner(os.getpid()),
                                        back_end.HOST: back_end.host_identity()})["Id"]
    try:
        api.put_archive(made, "/", _archive({
            "qcn/patch.diff": patch or "", "qcn/eval.sh": instance.script(), "qcn/run.sh": _script(patch is not None)}))
        output = api.attach(made, stdout=True, stderr=True, stream=True)
        api.start(made)
        log, flooded = _collect(api, made, output, time.monotonic() + limit + 60)
        state = api.inspect_container(made)["State"]
        if state["Running"]:
            return log, "killed" if flooded else "timeout"
        if state["OOMKilled"]:
            return log, "out_of_memory"
        return log, "timeout" if state["ExitCode"] == 137 and END not in log else ""
    finally:
        back_end.remove(client, made)


def _collect(api: Any, container: str, output: Any, deadline: float) -> tuple[str, bool]:
    """What a container prints until it ends, is too late, or prints too much (the second value)."""
    parts, size = [], 0
    # Silence beyond the time limit and an end that does not come are the tests' doing (they can stop the program that
    # ends them); the caller sees that the container still runs.
    with contextlib.suppress(requests.Timeout, requests.ConnectionError, urllib3.exceptions.ReadTimeoutError):
        for part in output:
            parts.append(part)
            size += len(part)
            if size > LOG_BYTES or time.monotonic() > deadline:
                return b"".join(parts).decode("utf-8", "replace"), size > LOG_BYTES
        api.wait(container, timeout=max(1.0, deadline - time.monotonic()))
    return b"".join(parts).decode("utf-8", "replace"), False


def _script(with_patch: bool) -> str:
    """What runs in the container: the patch by the first way that works, then the instance's script."""
    lines = ["cd /testbed"]
    if with_patch:
        for number, way in enumerate(_APPLY):
            again = "{ git checkout -- . ; git clean -fd; } >/dev/null 2>&1; " if number else ""
            lines.append(f'[ -n "$applied" ] || {{ {again}{way} /qcn/patch.diff >/qcn/apply.log 2>&1 && applied=1; }}')
        lines.append('[ -n "$applied" ] || { git apply --check --reverse /qcn/patch.diff 2>/dev/null && applied=1; }')
        lines.append(f"[ -n \"$applied\" ] || {{ echo '{APPLY_FAILED}'; cat /qcn/apply.log; exit 1; }}")
    return "\n".join([*lines, "exec /bin/bash /qcn/eval.sh 2>&1", ""])


def _archive(contents: Mapping[str, str]) -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, text in contents.items():
            info, data = tarfile.TarInfo(name), text.encode("utf-8", "surrogateescape")
            info.size, info.mode = len(data), 0o644
            archive.addfile(info, BytesIO(data))
    return buffer.getvalue()


def evaluate(instances: Mapping[str, Instance], patches: Sequence[tuple[str, str]], workers: int,
             folder: str | os.PathLike[str], progress: Callable[[], None] = lambda: None,
             timeout: float = TIMEOUT) -> list[Verdict]:
    """Verdicts on (instance id, patch) pairs, in order; logs go to `folder`/ID/test_output.txt.

    An instance that has a log and a verdict there from a run before is not run again.

    Raises:
      UserError: no Docker engine answers.
    """
    try:
        client = images.engine(timeout=timeout + 120)
        back_end.remove_leftovers(client)
    except SandboxError as error:
        raise UserError(f"--tasks: instances with images need Docker: {error}") from error

    def one(pair: tuple[str, str]) -> Verdict:
        name, patch = pair
        place = pathlib.Path(folder, name)
        known = place / "verdict.json"
        if known.is_file() and files.read_json(known).get("patch") == patch:
            done = Verdict.from_json(files.read_json(known)["verdict"])
        else:
            done, log = run(client, instances[name], patch, timeout)
            files.write_text(place / "test_output.txt", log)
            if done.outcome != "infrastructure":
                files.write_json(known, {"patch": patch, "verdict": done.to_json()})
        progress()
        return done

    with concurrent.futures.ThreadPoolExecutor(workers) as threads:
        return list(threads.map(one, patches))
