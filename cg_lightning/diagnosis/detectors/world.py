"""Files, processes, threads, sockets and foreign memory that a step uses.

A graph would use them once, when it is captured.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from cg_lightning.core.causes import Cause
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.findings import is_called_by_step

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
"""Audit events of Python that are seen by others than this process, or tell what others did."""
_MEMORY = frozenset(
    {
        *("ctypes.string_at", "ctypes.wstring_at", "ctypes.cdata", "ctypes.cdata/buffer"),
        *("ctypes.dlopen", "ctypes.call_function"),
    }
)
"""Audit events of ``ctypes``: memory is read or written by its address, or foreign code runs."""

_listeners: dict[int, Callable[[str], None]] = {}
"""The detector of the watched step of each thread, by thread; empty if no step is watched."""


def _on_event(event: str, _: tuple[Any, ...]) -> None:
    if _listeners and (event in _EVENTS or event in _MEMORY):
        listener = _listeners.get(threading.get_ident())
        if listener is not None:
            listener(event)


# audit hooks cannot be removed, so there is one in a process
_install_once = functools.cache(lambda: sys.addaudithook(_on_event))


class World(Detector):
    """Reports what a step does outside its process, from the audit events of Python.

    Writes to files that are open already are no events: such files are opaque objects. What PyTorch
    and Lightning open for themselves does not count, nor what an import opens. Threads are seen
    when they are started, since nothing that they do is seen.
    """

    causes = (Cause.WORLD, Cause.OPAQUE)

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        """See :class:`~cg_lightning.diagnosis.detector.Detector`."""
        _install_once()
        thread = threading.get_ident()
        before = _listeners.get(thread)
        _listeners[thread] = self._notice
        start_thread = threading.Thread.start

        def noticed(started: threading.Thread) -> None:
            if threading.get_ident() == thread:
                self._notice("threading.Thread.start")
            start_thread(started)

        try:
            with patch.object(threading.Thread, "start", noticed):
                yield
        finally:
            del _listeners[thread]
            if before is not None:
                _listeners[thread] = before

    def _notice(self, event: str) -> None:
        if not self.watch.is_paused and is_called_by_step(__file__):
            cause = Cause.OPAQUE if event in _MEMORY else Cause.WORLD
            self.watch.report_once_a_line(cause, event)
