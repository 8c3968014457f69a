"""Judge the preflight reports of all ranks: which ranks are missing, hang, differ, are slow or report an error.

A report is plain JSON: {"host", "values": {check: values}, "errors": {check: [code, text]}}.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from data_pipeline.errors import DataError, NodeFault

SLOWER = 1.5
FLOORS_S = {"matmul": 0.02, "link": 0.01}
"""A rank is slow if it takes over SLOWER times as long as is typical, and at least these seconds longer."""
CLOCK_S = 1.0
STORAGE = ("data", "storage", "disk")
COLLECTIVES = ("barrier", "broadcast", "all-reduce", "all-gather", "reduce-scatter")
CHECKS = ("join", "clock", "program", *STORAGE, "health", "matmul", *COLLECTIVES, "link")
NAMED = 6

Reports = Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True)
class Finding:
    """A problem that was found, and its exit code."""

    check: str
    code: int
    ranks: tuple[int, ...]
    text: str


def code_of(check: str) -> int:
    """Return the exit code for a failure of this check."""
    return DataError.exit_code if check in STORAGE else NodeFault.exit_code


def judge(reports: Reports, world: int) -> list[Finding]:
    """Return all findings, in the order of the checks."""
    reports = dict(sorted(reports.items()))
    found = [*_missing(reports, world), *_errors(reports), *_clocks(reports), *_unequal(reports)]
    for check, floor in FLOORS_S.items():
        found += _slow(check, _values(reports, check, "seconds"), floor)
    return sorted(found, key=lambda finding: CHECKS.index(finding.check))


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 0 without findings, 74 if any concerns storage or data, else 70."""
    return max((finding.code for finding in findings), default=0)


def _missing(reports: Reports, world: int) -> Iterator[Finding]:
    gone = tuple(rank for rank in range(world) if rank not in reports)
    if gone:
        yield Finding("join", NodeFault.exit_code, gone, "gave no report")


def _errors(reports: Reports) -> Iterator[Finding]:
    """Yield one finding per distinct error message, with all ranks that reported it."""
    by_words: dict[tuple[str, int, str], list[int]] = {}
    for rank, report in reports.items():
        for check, (code, text) in report["errors"].items():
            by_words.setdefault((check, code, text), []).append(rank)
    for (check, code, text), ranks in by_words.items():
        yield Finding(check, code, tuple(ranks), text)


def _clocks(reports: Reports) -> Iterator[Finding]:
    offsets = _values(reports, "clock", "offset_s")
    if not offsets:
        return
    middle = statistics.median_low(offsets.values())
    for rank, offset in offsets.items():
        if abs(offset - middle) > CLOCK_S:
            others = "rank 0's" if len(offsets) == 2 else "most others'"
            text = f"the clock is {offset - middle:+.1f} s off {others}; synchronize every node with one time server"
            yield Finding("clock", NodeFault.exit_code, (rank,), text)


def _unequal(reports: Reports) -> Iterator[Finding]:
    """Yield the ranks whose values differ from the most common one."""
    for check in ("program", "data"):
        for name in sorted({name for report in reports.values() for name in report["values"].get(check, {})}):
            said = _values(reports, check, name)
            usual, _ = Counter(said.values()).most_common(1)[0]
            for value in sorted(set(said.values()) - {usual}):
                ranks = tuple(rank for rank in said if said[rank] == value)
                text = f"{name} is {value}, of {'rank 0' if len(said) == 2 else 'most others'} {usual}"
                yield Finding(check, code_of(check), ranks, text)


def _slow(check: str, seconds: Mapping[int, float], floor: float) -> Iterator[Finding]:
    if not seconds:
        return
    typical = statistics.median_low(seconds.values())
    for rank, value in seconds.items():
        if value > max(SLOWER * typical, typical + floor):
            text = f"slow: {value * 1e3:.0f} ms, {value / typical:.1f} times the typical {typical * 1e3:.0f} ms"
            yield Finding(check, NodeFault.exit_code, (rank,), text)


def _values(reports: Reports, check: str, name: str) -> dict[int, Any]:
    """Return rank -> value, for the ranks that have one."""
    found = ((rank, report["values"].get(check, {}).get(name)) for rank, report in reports.items())
    return {rank: value for rank, value in found if value is not None}


# ------------------------------------------------------------------------------------------ for people


def show(console: Console, reports: Reports, world: int, findings: list[Finding]) -> None:
    """Print the table, and the findings below it."""
    hosts = {report["host"] for report in reports.values()}
    table = Table(title=f"{len(reports)} of {world} ranks on {len(hosts)} hosts")
    for column in ("check", "", "result"):
        table.add_column(column, overflow="fold")
    failed = {finding.check for finding in findings}
    for check in CHECKS:
        said = "\n".join(_told(reports, check))
        if check in failed or said:
            table.add_row(check, "[red]FAILED[/red]" if check in failed else "[green]ok[/green]", said)
    console.print(table)
    for finding in findings:
        console.print(f"{finding.check}: {where(reports, finding.ranks)}: {finding.text}", style="red", markup=False)


def where(reports: Reports, ranks: tuple[int, ...]) -> str:
    """Name ranks and their hosts, as in "rank 3 (host b)"."""
    hosts = list(dict.fromkeys(reports[rank]["host"] for rank in ranks if rank in reports))
    names = ", ".join(map(str, ranks[:NAMED])) + (f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else "")
    on = f" (host {', '.join(hosts[:NAMED])}{' ...' if len(hosts) > NAMED else ''})" if hosts else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {names}{on}"


def _told(reports: Reports, check: str) -> Iterator[str]:
    """Yield the table's lines for a check."""
    if check == "clock" and (offsets := list(_values(reports, check, "offset_s").values())):
        yield f"within {(max(offsets) - min(offsets)) * 1e3:.0f} ms"
        return
    seconds = _values(reports, check, "seconds")
    if seconds:
        slowest = max(seconds, key=lambda rank: seconds[rank])
        rate = next((name for name in ("tflops", "gb_s") if _values(reports, check, name)), "")
        typical = statistics.median_low(_values(reports, check, rate).values())
        speed = f"{typical:.3g} {rate.replace('gb_s', 'GB/s').replace('tflops', 'TFLOP/s')}, " if typical else ""
        yield f"{speed}slowest rank {slowest}: {seconds[slowest] * 1e3:.3g} ms"
        return
    for name in sorted({name for report in reports.values() for name in report["values"].get(check, {})}):
        values = _values(reports, check, name)
        if values:
            yield f"{name}: {_shown(check, name, list(values.values()))}"


def _shown(check: str, name: str, values: list[Any]) -> str:
    if check == "storage":
        return f"created, read, kept from being overwritten, removed in {max(values):.2g} s"
    if check == "disk":
        return f"{min(values) / 1e9:.3g} GB"
    return ", ".join(sorted(map(str, set(values))))
