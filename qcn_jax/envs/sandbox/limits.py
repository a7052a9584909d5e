"""What one sandbox may use."""

import dataclasses

BROWSER = {"memory_mb": 3072, "processes": 1024, "disk_mb": 768}  # at least; a browser's threads count as processes


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of one sandbox (bytes in MiB); each job inside is bounded again by its own time limit."""

    memory_mb: int = 1024
    processes: int = 64
    cpus: float = 2.0
    file_mb: int = 64
    disk_mb: int = 512
    output_bytes: int = 65_536


def bounds(limits: Limits, browser: bool) -> dict[str, int | None]:
    """What the server inside is told of limits, in bytes; with a browser at least BROWSER.

    A browser reserves far more addresses than it uses memory: then the data that a process may write is bounded.
    """
    if browser:
        limits = dataclasses.replace(limits, **{name: max(least, getattr(limits, name))
                                                for name, least in BROWSER.items()})
    return {"memory": None if browser else limits.memory_mb << 20, "data": limits.memory_mb << 20 if browser else None,
            "file": limits.file_mb << 20, "disk": limits.disk_mb << 20, "processes": limits.processes,
            "cpus": limits.cpus, "output": limits.output_bytes}
