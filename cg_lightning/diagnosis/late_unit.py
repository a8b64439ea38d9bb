"""One unit of metrics in a watched step: whether its updates may follow the step."""

from __future__ import annotations

import dataclasses

from cg_lightning.diagnosis.findings import Finding
from cg_lightning.metrics.units import MetricUnit


class LateUnit:
    """A unit of metrics in one watched step."""

    def __init__(self, unit: MetricUnit) -> None:
        self.unit = unit
        self.findings: list[Finding] = []
        """Findings in calls of these metrics."""
        self.is_called = False
        """Whether the step has called one of these metrics."""
        self.position = 0
        """Number of findings of the step before the first call."""
        self.is_logged = False
        """Whether ``self.log`` has read the value of one of these metrics."""
        self.refusal = ""
        """Why the calls cannot follow the step; empty if they can."""

    def called(self, position: int) -> None:
        """Note a call of one of these metrics, and for the first one the findings before it."""
        if not self.is_called:
            self.is_called, self.position = True, position

    def logged(self) -> None:
        """Note that ``self.log`` has read the value of one of these metrics."""
        self.is_logged = True

    def refuse(self, why: str) -> None:
        """Note why the calls cannot follow the step. The first reason stays."""
        self.refusal = self.refusal or why

    @property
    def is_late(self) -> bool:
        """Whether a graph leaves the calls out, and they are made after each replay."""
        return bool(self.findings) and self.is_called and not self.refusal

    def explain(self, finding: Finding) -> Finding:
        """Return a finding of these metrics that also says why the calls cannot follow the step."""
        if not self.refusal:
            return finding
        operation = f"{finding.operation} of a metric {self.refusal}"
        return dataclasses.replace(finding, operation=operation)
