"""``print``, ``self.print``, standard output, warnings, the user's loggers and the Trainer's."""

from __future__ import annotations

import builtins
import contextlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from cg_lightning.backends.texts_of_pytorch import is_sync_warning
from cg_lightning.core.causes import Cause
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.detectors.trainer_reads import noticed_reads
from cg_lightning.diagnosis.findings import is_called_by_step
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.diagnosis.writes import is_called_by_user
from cg_lightning.guards.sources import MISSING
from cg_lightning.modules.interception import replaced_method
from cg_lightning.modules.kinds import is_user_file


class _Stream:
    """Stands in for a stream whose ``write`` cannot be replaced."""

    def __init__(self, stream: Any, write: Callable[..., Any]) -> None:
        self._stream = stream
        self.write = write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _replaced_write(name: str, stream: Any, write: Callable[..., Any]) -> Iterator[None]:
    """Replace ``write`` of a stream, or else the stream itself."""
    try:  # not by setattr: a stream around another one may pass it on, and delattr not
        own: dict[str, Any] = object.__getattribute__(stream, "__dict__")
    except AttributeError:
        with patch.object(sys, name, _Stream(stream, write)):
            yield
        return
    before = own.get("write", MISSING)
    own["write"] = write
    try:
        yield
    finally:
        own["write"] = before
        if before is MISSING:
            del own["write"]


class Printing(Detector):
    """Reports what a step says: a graph would say it once, when it is captured."""

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        self._is_suspended = False

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """What the compiler warns of while it compiles is said once, by itself."""
        with patch.object(self, "_is_suspended", True):
            yield

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._noticing_python())
            stack.enter_context(self._noticing_streams())
            stack.enter_context(self._noticing_warnings())
            if self.watch.is_lightning:
                stack.enter_context(replaced_method(self.watch.root, "print", self._print))
            stack.enter_context(noticed_reads(self.watch, Cause.PRINTED, ("logger", "loggers")))
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
            # with ``stacklevel``, the record may name any file
            is_users = is_user_file(record.pathname) or is_called_by_user(sys._getframe(1))
            if threading.get_ident() == thread and is_users:
                self.watch.report(Cause.PRINTED, "logging")
            handle(logger, record)

        with (
            patch.object(builtins, "print", noticed),
            patch.object(logging.Logger, "handle", noticed_record),
        ):
            yield

    @contextlib.contextmanager
    def _noticing_streams(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in ("stdout", "stderr"):
                if (stream := getattr(sys, name)) is not None:
                    write = self._noticed(f"sys.{name}.write", stream.write)
                    stack.enter_context(_replaced_write(name, stream, write))
            stack.enter_context(patch.object(os, "write", self._noticed("os.write", os.write)))
            yield

    @contextlib.contextmanager
    def _noticing_warnings(self) -> Iterator[None]:
        """Most warnings are shown once, so the next step is watched as well."""
        # private; C code looks it up for each warning that is shown
        show = getattr(warnings, "_showwarnmsg", None)
        receiver = getattr(warnings, "_showwarnmsg_impl", None)
        if show is None:
            yield
            return
        thread = threading.get_ident()

        def noticed(message: Any) -> None:
            # another receiver: the step catches its own warnings
            is_seen = getattr(warnings, "_showwarnmsg_impl", None) is receiver
            is_ours = self._is_suspended or self.watch.is_paused or self.watch.is_in_framework
            is_ours |= is_sync_warning(message.message)  # the backend has asked for them
            if is_seen and not is_ours and threading.get_ident() == thread:
                self.watch.report_once_a_line(Cause.PRINTED, "warnings.warn")
                self.watch.notes.did_one_time_work = True
            show(message)

        with patch.object(warnings, "_showwarnmsg", noticed):
            yield

    def _noticed(self, name: str, write: Callable[..., Any]) -> Callable[..., Any]:
        thread = threading.get_ident()

        def noticed(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread and is_called_by_step(__file__):
                self.watch.report_once_a_line(Cause.PRINTED, name)
            return write(*args, **kwargs)

        return noticed
