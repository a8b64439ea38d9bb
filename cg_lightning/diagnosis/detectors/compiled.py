"""Modules that ``torch.compile`` runs: they are watched from outside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from cg_lightning.core.causes import Cause
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.watched_step import ModuleCall
from cg_lightning.modules.compiled import is_compiled_by_callback, is_graphed_by_compiler


class CompiledModules(Detector):
    """Lets compiled modules run compiled, and reports those that have CUDA graphs of their own."""

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        yield
        if self.watch.hidden and self.watch.step.findings:
            self.watch.notes.did_one_time_work = True  # the findings may come from compiling

    def around_call(self, call: ModuleCall) -> contextlib.AbstractContextManager[None]:
        if not call.hidden:
            return contextlib.nullcontext()
        assert call.module is not None
        if is_graphed_by_compiler(call.module):
            self.watch.report(Cause.GRAPHED_ALREADY, type(call.module).__name__)
        # the user's compiled code gives other bits than the same code as written
        return self.watch.run.suspended_for_compiled_code(is_compiled_by_callback(call.module))
