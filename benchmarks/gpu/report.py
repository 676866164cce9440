"""The report of gpu_check.py: tables that grow row by row, and what failed. It can be written at any time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DRY = "dry run"
INTRODUCTION = """
Times are medians; *measured* columns were measured by this run, *predicted* columns are those of the model in
`kernels/triton/cost.py` for this GPU's number of multiprocessors and its measured copy bandwidth. Shares of bandwidth
are bytes that must be moved, divided by the measured time, as a share of the measured copy bandwidth. A *floor* is the
least time at the measured rates: weights, keys and values at the copy bandwidth, products at the product rate. *host*
is the host's own time for a launch or a step. Goals are for an H100: "reached" compares a measured figure with one.
"""
DRY_INTRODUCTION = """
**This is a dry run on a CPU: tiny sizes, Triton's interpreter, the host's clock. It shows that the script works. No
figure says anything about a GPU.**
"""


@dataclass
class Section:
    """What a section has reported. ``state``: how it ended, "" while it runs."""

    title: str
    state: str = ""
    notes: list[str] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


class Report:
    """Collects records of sections, in the order in which the sections began."""

    def __init__(self, *, dry: bool) -> None:
        self.dry = dry
        self.facts: dict[str, Any] = {}  # of the machine: name, versions, measured rates
        self._sections: dict[str, Section] = {}

    def begin(self, name: str, title: str) -> None:
        """Begin the section ``name``."""
        self._sections[name] = Section(title)

    def add(self, name: str, record: Mapping[str, Any]) -> None:
        """Add a record of a worker: ``{"facts": {…}}``, ``{"note": text}``, ``{"error": text}`` or
        ``{"table": title, "row": {column: value}}``. Other keys are ignored."""
        section = self._sections[name]
        self.facts |= record.get("facts", {})
        if "note" in record:
            section.notes.append(record["note"])
        if "error" in record:
            section.errors.append(record["error"])
        if "table" in record:
            section.tables.setdefault(record["table"], []).append(dict(record["row"]))

    def end(self, name: str, state: str, error: str = "") -> None:
        """End a section; ``error`` is the text of what ended it early."""
        self._sections[name].state = state
        if error:
            self._sections[name].errors.append(error)

    @property
    def failed(self) -> list[str]:
        """The titles of sections with errors. A goal that isn't reached is none."""
        return [one.title for one in self._sections.values() if one.errors]

    def file_name(self) -> str:
        """``gpu-NAME.md``, the GPU's name in letters, digits and dashes; NAME is "unknown" before it is known."""
        name = "".join(c if c.isalnum() else "-" for c in str(self.facts.get("GPU", "unknown")).lower())
        return f"gpu-{'-'.join(part for part in name.split('-') if part)}.md"

    def markdown(self) -> str:
        """The whole report."""
        title = f"GPU check: {self.facts.get('GPU', 'unknown')}" + (f" ({DRY})" if self.dry else "")
        lines = [f"# {title}", DRY_INTRODUCTION if self.dry else INTRODUCTION]
        lines += [f"* {name}: {self.cell(value)}" for name, value in self.facts.items()]
        lines += ["", "| section | state | rows that fail their bound or goal |", "|---|---|---|"]
        for one in self._sections.values():
            lines.append(f"| {one.title} | {one.state or 'running'} | {_bad_rows(one)} |")
        for one in self._sections.values():
            if content := self._section(one):
                lines += ["", f"## {one.title}", *content]
        return "\n".join(lines) + "\n"

    def _section(self, section: Section) -> list[str]:
        lines: list[str] = []
        for note in section.notes:
            lines += ["", note]
        for title, rows in section.tables.items():
            lines += ["", f"### {title}", "", *self.table(rows)]
        for error in section.errors:
            lines += ["", "**Failed:**", "", "```text", error.strip(), "```"]
        return lines

    def table(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Markdown lines. The columns are those of all rows; what a row doesn't have is "-"."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        return lines + [f"| {' | '.join(self.cell(row.get(column)) for column in columns)} |" for row in rows]

    def cell(self, value: Any) -> str:
        """A value as text. Every measured figure (they are floats) of a dry run is marked."""
        if value is None:
            return "-"
        if isinstance(value, bool):
            return "yes" if value else "**no**"
        if not isinstance(value, float):
            return str(value).replace("|", "\\|").replace("\n", " ")
        size = abs(value)
        text = f"{value:.2e}" if size and size < 1e-3 else f"{value:.0f}" if size >= 100 else f"{value:.3g}"
        return f"{text} ({DRY})" if self.dry else text

    def write(self, path: Path) -> None:
        """Write the report; a reader sees either the old or the new text."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(self.markdown(), encoding="utf-8")
        unfinished.replace(path)


def _bad_rows(section: Section) -> int:
    """The number of rows with a value False: a bound or a goal that isn't met."""
    rows = [row for table in section.tables.values() for row in table]
    return sum(any(value is False for value in row.values()) for row in rows)
