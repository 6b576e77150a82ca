"""What a benchmark says at the end: tables in markdown, goals, and the same as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


class BenchmarkError(Exception):
    """Why there are no figures; one line that says what to do."""


@dataclass(frozen=True)
class Goal:
    """What was to be reached, and whether it was."""

    text: str
    reached: bool

    def __str__(self) -> str:
        return f"- {'PASS' if self.reached else 'FAIL'}: {self.text}"


@dataclass(frozen=True)
class Report:
    """One part's outcome. `figures` are for machines."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    goals: Sequence[Goal]
    notes: Sequence[str] = ()
    figures: dict[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """For a terminal or the README."""
        return "\n".join(
            [f"### {self.title}", "", *_table(self.header, self.rows), "", *self.notes, "", *map(str, self.goals), ""]
        )

    def as_json(self) -> dict[str, Any]:
        """The figures and the goals."""
        return {"figures": self.figures, "goals": [asdict(goal) for goal in self.goals]}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"

    rule = "|" + "|".join([":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return [line(header), rule, *map(line, rows)]
