"""Curves on disk, one JSON object a line, rewound when a run resumes; speed; profiles on demand."""

import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax

from qcn_jax import files, journal
from qcn_jax.sharding.chips import chip_of

PROFILED_STEPS = 3
DIGITS = 9  # significant ones, which tell all float32 numbers apart


class MetricsLog:
    """Appends rows to `metrics.jsonl`.

    A killed run may have logged steps after its last checkpoint, and half a line. Opening the log at the step
    that training resumes from removes both, so that a resumed curve is the curve of an uninterrupted run.
    """

    def __init__(self, path: files.Path, resume_step: int = 0, enabled: bool = True) -> None:
        """Opens the log at `path`, keeping the rows of steps up to `resume_step`; not `enabled`, it writes nothing."""
        self._lines = journal.Lines(path, keep=lambda row: row["step"] <= resume_step) if enabled else None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Adds a row; non-finite numbers are written as null because JSON has none."""
        if self._lines is not None:
            self._lines.add({"step": step} | {name: _plain(value) for name, value in values.items()})

    def close(self) -> None:
        """Closes the file; its rows are on disk."""
        if self._lines is not None:
            self._lines.close()


def read_metrics(path: files.Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a half-written last line is left out, a missing file has no rows."""
    return [row for _, row in journal.read(path)]


class Meter:
    """Speed of a loop: tokens a second since the last reading, wait for input, utilisation, and goodput.

    `input_wait` is the share of the time in which the host made batches ready. Devices are busy with the step before
    meanwhile, so that they wait for at most that long.

    Goodput is the share of the wall time since the meter began that went into steps, the rest being
    compilation, checkpoints and start-up. Utilisation (MFU) is the model's FLOPs, without recomputation, over
    what the devices could do; it is left out for devices whose peak is not known.
    """

    def __init__(self, flops_per_token: float | None = None) -> None:
        chip = chip_of(jax.devices()[0].device_kind)
        self._flops = flops_per_token
        self._peak = chip.peak_flops * jax.device_count() if chip else None
        self._begin = self._mark = time.perf_counter()
        self._useful = 0.0
        self._tokens = 0
        self._steps = 0
        self._waited: float | None = None

    def add(self, tokens: int, waited: float | None = None) -> None:
        """Counts a finished step of so many tokens; `waited` are the seconds in which its input was made ready."""
        self._tokens += tokens
        self._steps += 1
        if waited is not None:
            self._waited = (self._waited or 0.0) + waited

    def skip(self) -> None:
        """The time since the last reading was not training (a compilation, a checkpoint)."""
        self._mark = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Speed since the last reading, zero where no step was counted; starts a new one."""
        now = time.perf_counter()
        elapsed = max(now - self._mark, 1e-9)
        self._useful += elapsed
        values = {
            "tokens_per_second": self._tokens / elapsed,
            "seconds_per_step": elapsed / self._steps if self._steps else 0.0,
            "goodput": self._useful / max(now - self._begin, 1e-9),
            "seconds": now - self._begin,
        }
        if self._flops is not None and self._peak is not None:
            values["mfu"] = values["tokens_per_second"] * self._flops / self._peak
        if self._waited is not None:
            values["input_wait"] = self._waited / elapsed
        self._mark, self._tokens, self._steps, self._waited = now, 0, 0, None
        return values


class Profiler:
    """Traces PROFILED_STEPS steps whenever a file called `profile` appears in a loop's folder (and removes it)."""

    def __init__(self, directory: pathlib.Path, log: Callable[[str], None]) -> None:
        self._request = directory / "profile"
        self._folder = directory / "profiles"
        self._log = log
        self._left = 0

    def step(self, done: int) -> None:
        """To be called before each step, with the number of those done."""
        if self._left:
            self._left -= 1
            if not self._left:
                jax.profiler.stop_trace()
        elif self._request.exists():
            self._request.unlink(missing_ok=True)
            folder = self._folder / f"step_{done}"
            self._log(f"traces {PROFILED_STEPS} steps into {folder}")
            jax.profiler.start_trace(folder)
            self._left = PROFILED_STEPS

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._left:
            self._left = 0
            jax.profiler.stop_trace()


def _plain(value: Any) -> Any:
    if isinstance(value, (str, bool, int, type(None), dict, list)):
        return value
    value = float(value)
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
