"""Verdicts: what `samovar doctor` says of one thing, and the pure judgements that need no look at anything."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway import open_files
from gateway.checks import Finding
from kernelprovisioner.images import KernelImage, PoolBounds
from kernelprovisioner.schedule import Entry

#: As many connections at once are usual; a gateway takes more where it may open more files.
_CONNECTIONS = 500
_GIBIBYTE = 2**30


class Verdict(enum.StrEnum):
    """How a judgement is to be taken."""

    OK = "ok"
    WARNING = "warning"  # it works, but not as well as it should, or not for long
    FAILURE = "failure"


@dataclass(frozen=True)
class Judgement:
    """What one thing looks like. `mend`: what to do, a command where there is one; empty where all is well."""

    what: str
    verdict: Verdict
    text: str
    mend: str = ""


@dataclass(frozen=True)
class Served:
    """A kernel image as it would be served: with its limits, and the bounds and the schedule of its pool."""

    image: KernelImage
    bounds: PoolBounds
    schedule: Sequence[Entry] = ()


def good(what: str, text: str) -> Judgement:
    """Nothing to do."""
    return Judgement(what, Verdict.OK, text)


def warning(what: str, text: str, mend: str) -> Judgement:
    """It works, but not as well as it should, or not for long."""
    return Judgement(what, Verdict.WARNING, text, mend)


def failure(what: str, text: str, mend: str) -> Judgement:
    """It does not work."""
    return Judgement(what, Verdict.FAILURE, text, mend)


def judged(what: str, finding: Finding, fine: str) -> Judgement:
    """Return what a check that /health/detailed makes, too, has found; `fine` is what to say where all is well."""
    if finding.status == "healthy":
        return good(what, fine)
    verdict = Verdict.FAILURE if finding.status == "unhealthy" else Verdict.WARNING
    remedy = (finding.remedy or "samovar logs").removeprefix("run: ")
    return Judgement(what, verdict, finding.error or finding.status, remedy)


def counted(count: int, noun: str, plural: str = "s") -> str:
    """Return "1 warning", "2 warnings"; `plural` is the plural's ending."""
    return f"{count} {noun}{'' if count == 1 else plural}"


def worst(judgements: Iterable[Judgement]) -> Verdict:
    """Return the worst verdict; ok where there is none."""
    found = {judgement.verdict for judgement in judgements}
    return next((verdict for verdict in (Verdict.FAILURE, Verdict.WARNING) if verdict in found), Verdict.OK)


def judge_bounds(served: Served) -> Judgement:
    """Whether a pool keeps something warm, and has room to refill and for its schedule."""
    name, bounds = served.image.name, served.bounds
    what = f"pool {name}"
    for entry in served.schedule:
        if entry.count > bounds.max:
            said = f"has {bounds.max} places at most, fewer than its schedule asks for: {entry}"
            return warning(what, said, "raise PoolSettings.bounds or CONTAINER_POOL_MAX_SIZE")
    if bounds.min == 0:
        said = f"keeps nothing warm (min 0, max {bounds.max}): a first cell may wait for a start"
        return warning(what, said, "set PoolSettings.bounds or CONTAINER_POOL_MIN_SIZE")
    if bounds.min == bounds.max:
        said = f"keeps all of its {bounds.max} places warm: once one is claimed there is no room to refill"
        return warning(what, said, "raise PoolSettings.bounds or CONTAINER_POOL_MAX_SIZE")
    return good(what, f"keeps {bounds.min} warm, has {bounds.max} at most")


def judge_files(hard: int | None, served: Iterable[Served]) -> Judgement:
    """Whether the limit of open files (None: there is none) is enough for full pools; the gateway raises its own."""
    sandboxes = sum(one.bounds.max for one in served)
    needed = open_files.needed(sandboxes, _CONNECTIONS)
    if hard is not None and hard < needed:
        return failure(
            "open files",
            f"this user may open {hard} files, {sandboxes} sandboxes need about {needed}",
            f"ulimit -Hn {2 * needed} as root, or LimitNOFILE={2 * needed} in the service",
        )
    allowed = "any number" if hard is None else str(hard)
    return good("open files", f"{allowed} may be open, {sandboxes} sandboxes need about {needed}")


def judge_memory(served: Sequence[Served], total: int) -> Judgement:
    """Whether the machine's memory (bytes) is enough for full pools in which every sandbox reaches its limit."""
    most = sum(one.bounds.max * one.image.limits.container_memory_mb for one in served) * 2**20
    warm = sum(one.bounds.min * one.image.limits.container_memory_mb for one in served) * 2**20
    said = (
        f"full pools may take {most / _GIBIBYTE:.1f} GiB at their limits, the machine has {total / _GIBIBYTE:.1f} GiB"
    )
    mend = "lower CONTAINER_POOL_MAX_SIZE or MAX_MEMORY_MB"
    if warm > total:
        return failure("memory", f"{said}; the warm sandboxes alone may take {warm / _GIBIBYTE:.1f} GiB", mend)
    if most > total:
        return warning("memory", f"{said}: then the operating system kills what it likes", mend)
    return good("memory", said)


def judge_cpus(served: Served, cpus: float) -> Judgement:
    """Whether one sandbox may use more cores than there are."""
    what, wanted = f"CPU {served.image.name}", served.image.limits.cpus
    if wanted > cpus:
        return warning(what, f"a sandbox may use {wanted:g} cores, the machine has {cpus:g}", "lower MAX_CPUS")
    return good(what, f"a sandbox may use {wanted:g} of {cpus:g} cores")


def judge_enforcement(info: Mapping[str, Any]) -> list[Judgement]:
    """Which locks and limits of a sandbox an engine cannot hold, by what it says of itself."""
    found = []
    limits = (("MemoryLimit", "memory"), ("PidsLimit", "processes"), ("CpuCfsQuota", "CPU"))
    missing = [words for key, words in limits if info.get(key) is False]
    if missing:
        said = f"the engine cannot limit {', '.join(missing)}: a sandbox could take all of this machine"
        found.append(failure("engine limits", said, "enable these cgroup controllers; docker info shows its warnings"))
    if not any("seccomp" in str(option) for option in info.get("SecurityOptions") or ()):
        found.append(
            failure("engine limits", "the engine has no seccomp: no sandbox starts", "use a kernel with seccomp")
        )
    if not found:
        version, driver = info.get("CgroupVersion", "1"), info.get("Driver", "unknown")
        found.append(good("engine limits", f"all can be enforced (cgroup v{version}, seccomp; storage {driver})"))
    return found


def judge_health(body: Mapping[str, Any]) -> list[Judgement]:
    """What a running gateway's /health/detailed says is not healthy."""
    services = body.get("services")
    if not isinstance(services, Mapping):
        return []
    found = []
    for name, service in services.items():
        told: Mapping[str, Any] = service if isinstance(service, Mapping) else {}
        state = told.get("status")
        if state != "healthy":
            reason = told.get("error") or told.get("last_error") or "no reason is told"
            mend = str(told.get("remedy") or "samovar logs; samovar logs --exits").removeprefix("run: ")
            verdict = failure if state == "unhealthy" else warning
            found.append(verdict(f"gateway's {name}", f"{state}: {reason}", mend))
    return found or [good("gateway", f"all its {len(services)} services are healthy")]
