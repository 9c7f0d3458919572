"""A hook of pytest: says at the end of a run what was not tested, and why."""

from collections import defaultdict
from pathlib import Path

from pytest import TerminalReporter


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """List all reasons for which tests were skipped, each with how many and in which files."""
    files = defaultdict[str, list[str]](list)
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        files[reason.removeprefix("Skipped: ")].append(Path(report.nodeid.partition("::")[0]).name)
    if files:
        terminalreporter.section("NOT TESTED", "=", yellow=True, bold=True)
    for reason, names in sorted(files.items(), key=lambda entry: -len(entry[1])):
        count = f"{len(names)} test{'s' * (len(names) > 1)} skipped"
        terminalreporter.line(f"{count}: {reason} ({', '.join(sorted(set(names)))})", yellow=True)
