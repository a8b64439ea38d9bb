"""Files, processes, threads, sockets and foreign memory that a step uses.

A graph would use them once, when it is captured.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from unittest.mock import patch

from cg_lightning.core.causes import Cause
from cg_lightning.core.lines import Elsewhere
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.findings import is_called_by_step
from cg_lightning.guards import audit_events

_EVENTS = frozenset(
    {
        *("open", "builtins.input", "mmap.__new__", "fcntl.flock", "fcntl.lockf"),
        *("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.__new__"),
        *("subprocess.Popen", "pty.spawn", "sqlite3.connect", "urllib.Request"),
        *("os.chmod", "os.chown", "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg"),
        *("os.link", "os.listdir", "os.mkdir", "os.posix_spawn", "os.putenv", "os.remove"),
        *("os.rename", "os.rmdir", "os.scandir", "os.spawn", "os.startfile", "os.symlink"),
        *("os.system", "os.truncate", "os.unsetenv", "os.utime", "os.chdir", "os.fchdir"),
    }
)
"""Audit events of Python for actions that other processes see, or that show what they did."""
_MEMORY = frozenset(
    {
        *("ctypes.string_at", "ctypes.wstring_at", "ctypes.cdata", "ctypes.cdata/buffer"),
        *("ctypes.dlopen", "ctypes.call_function"),
    }
)
"""Audit events of ``ctypes``: memory is read or written by its address, or foreign code runs."""


class World(Detector):
    """Reports what a step does outside its process, from the audit events of Python.

    Writes to files that are open already are no events: such files are opaque objects. What PyTorch
    and Lightning open for themselves does not count, nor what an import opens. Threads are seen
    when they are started, since nothing that they do is seen. Functions and classes that a step
    changes in place (``function.__code__ = ...``) are reported as well.
    """

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        audit_events.listen()
        listeners = audit_events.listeners
        thread = threading.get_ident()
        before = listeners.get(thread)
        listeners[thread] = self._on_event
        start_thread = threading.Thread.start

        def noticed(started: threading.Thread) -> None:
            if threading.get_ident() == thread:
                self._notice("threading.Thread.start")
            start_thread(started)

        rewritten = len(audit_events.rewritten())
        try:
            with patch.object(threading.Thread, "start", noticed):
                yield
        finally:
            del listeners[thread]
            if before is not None:
                listeners[thread] = before

        for name in audit_events.rewritten()[rewritten:]:
            self.watch.report_unless_found(Cause.STATE_REBOUND, name, location=Elsewhere.AT_THE_END)

    def _on_event(self, event: str) -> None:
        if event in _EVENTS or event in _MEMORY:
            self._notice(event)

    def _notice(self, event: str) -> None:
        if not self.watch.is_paused and is_called_by_step(__file__, audit_events.__file__):
            cause = Cause.OPAQUE if event in _MEMORY else Cause.WORLD
            self.watch.report_once_a_line(cause, event)
