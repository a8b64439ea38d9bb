"""Forward hooks: arbitrary code around the call of a module."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

from cg_lightning.core.causes import Cause
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.watched_step import ModuleCall
from cg_lightning.modules.attributes import global_hooks, hooks_of


class ForwardHooks(Detector):
    """Reports called modules that have forward hooks; global hooks belong to every module."""

    causes = (Cause.FORWARD_HOOK,)

    def around_call(self, call: ModuleCall) -> AbstractContextManager[None]:
        """See :class:`~cg_lightning.diagnosis.detector.Detector`."""
        assert call.module is not None
        modules = call.hidden or (call.module,)
        if any(global_hooks()) or any(any(hooks_of(module)) for module in modules):
            self.watch.report(Cause.FORWARD_HOOK, type(call.module).__name__)
        return contextlib.nullcontext()
