"""Forward hooks: arbitrary code around the call of a module."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

from cg_lightning.core.causes import Cause
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.findings import NOT_YOURS
from cg_lightning.diagnosis.watched_step import ModuleCall
from cg_lightning.modules.attributes import global_hooks, hooks_of, profiler_of


class ForwardHooks(Detector):
    """Reports called modules that have forward hooks; global hooks belong to every module.

    Hooks that a profiler adds are told apart: the user's line did not add them.
    """

    causes = (Cause.FORWARD_HOOK, Cause.PROFILER_HOOK)

    def around_call(self, call: ModuleCall) -> AbstractContextManager[None]:
        """See :class:`~cg_lightning.diagnosis.detector.Detector`."""
        assert call.module is not None
        modules = call.hidden or (call.module,)
        tables = [*global_hooks(), *[table for module in modules for table in hooks_of(module)]]
        if any(tables):
            profilers = {profiler_of(hook) for table in tables for hook in table.values()}
            for name in sorted(profilers - {""}):
                self.watch.report(Cause.PROFILER_HOOK, name, location=NOT_YOURS)
            if "" in profilers:
                self.watch.report(Cause.FORWARD_HOOK, type(call.module).__name__)
        return contextlib.nullcontext()
