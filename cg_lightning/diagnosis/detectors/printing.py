"""``print``, ``self.print``, the user's loggers and the Trainer's."""

from __future__ import annotations

import builtins
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from cg_lightning.core.causes import Cause
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.detectors.trainer_reads import ReadNames
from cg_lightning.modules.interception import Interception, replaced_method
from cg_lightning.modules.kinds import is_user_file


class Printing(Detector):
    """Reports what a step says: a graph would say it once, when it is captured."""

    causes = (Cause.PRINTED,)

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        """See :class:`~cg_lightning.diagnosis.detector.Detector`."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._noticing_python())
            if self.watch.is_lightning:
                stack.enter_context(replaced_method(self.watch.root, "print", self._print))
            if self.watch.is_lightning and id(self.watch.root) not in self.watch.hidden:
                handler = ReadNames(self.watch, Cause.PRINTED, ("logger", "loggers"))
                stack.callback(Interception(self.watch.root, handler).remove)
            yield

    def _print(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.watch.report(Cause.PRINTED, "self.print")
        if not self.watch.run_logging:
            return None
        with self.watch.in_framework():
            return original(*args, **kwargs)

    @contextlib.contextmanager
    def _noticing_python(self) -> Iterator[None]:
        original, handle, thread = builtins.print, logging.Logger.handle, threading.get_ident()

        def noticed(*args: Any, **kwargs: Any) -> None:
            if threading.get_ident() == thread:
                self.watch.report(Cause.PRINTED, "print")
            original(*args, **kwargs)

        def noticed_record(logger: logging.Logger, record: logging.LogRecord) -> None:
            if threading.get_ident() == thread and is_user_file(record.pathname):
                self.watch.report(Cause.PRINTED, "logging")
            handle(logger, record)

        with (
            patch.object(builtins, "print", noticed),
            patch.object(logging.Logger, "handle", noticed_record),
        ):
            yield
