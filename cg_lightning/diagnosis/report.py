"""Everything that prevents graphs, as an object and as a table."""

from __future__ import annotations

import dataclasses

from cg_lightning.diagnosis.findings import Finding
from cg_lightning.diagnosis.watched_step import WatchedStep
from cg_lightning.report.html import html_paragraph, html_table

_HEADERS = ("cause", "operation", "module", "location", "remedy")


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What an eager run showed of a module.

    It does *not* see what other batches would make the module do.

    Example::

        >>> import torch
        >>> from cg_lightning import diagnose
        >>> found = diagnose(torch.nn.Linear(3, 2), torch.ones(4, 3))
        >>> found.findings, found.capturable()
        ([], True)
        >>> print(found)
        Nothing stands in the way of one graph.
    """

    findings: list[Finding]
    """Everything that prevents one graph of the whole, in order."""
    unkeyable: str
    """Why such a batch has no key, so that its steps run eagerly; empty if it has one."""
    _watched: WatchedStep = dataclasses.field(repr=False)
    stopped: str = ""
    """Why the step was not run to its end; empty if it was."""

    def capturable(self, path: str = "") -> bool:
        """Whether the submodule at ``path`` could be one graph; empty: the step, or the module.

        Raises:
            ValueError: The run did not call such a submodule.
        """
        if not path:
            return not (self.findings or self.unkeyable or self.stopped)
        findings = self._watched.findings_of(path)
        if findings is None:
            called = ", ".join(path for path in self._watched.called() if path) or "none"
            raise ValueError(f"No submodule {path!r} was called; these were: {called}.")
        return not findings

    def largest_capturable(self) -> list[str]:
        """Return the paths of the fewest, largest submodules with parameters and no finding."""
        return list(self._watched.largest_capturable())

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [
            (f.cause.value, f.operation, f.module or "-", f.where, f.remedy) for f in self.findings
        ]
        return list(dict.fromkeys(rows))  # one line may be found twice

    def __str__(self) -> str:
        if not self.findings:
            return self.unkeyable or "Nothing stands in the way of one graph."
        lines = [line for line in (self.unkeyable, self.stopped) if line]
        rows = [_HEADERS, *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADERS))]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        pieces = (
            ", ".join(path or "the whole module" for path in self.largest_capturable()) or "none"
        )
        return "\n".join([*lines, f"Largest capturable submodules: {pieces}"])

    def _repr_html_(self) -> str:
        if not self.findings:
            return html_paragraph(str(self))
        notes = [line for line in (self.unkeyable, self.stopped) if line]
        return "".join(map(html_paragraph, notes)) + html_table(_HEADERS, self._rows())
