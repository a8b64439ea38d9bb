"""``self.log`` and ``self.log_dict``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from cg_lightning.core.causes import Cause
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.effects.logged_numbers import with_tensor
from cg_lightning.modules.interception import replaced_method

LOGGING_METHODS = ("log", "log_dict")
"""Methods of a LightningModule that log."""


class Logging(Detector):
    """Reports calls of ``self.log``.

    If there are effects, a graph of the whole step can hold them, and that of a submodule cannot.
    """

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in LOGGING_METHODS if self.watch.is_lightning else ():
                stack.enter_context(replaced_method(self.watch.root, name, self._replace(name)))
            yield

    def _replace(self, name: str) -> Callable[..., Any]:
        def log(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with self._held_by_a_step_if(self.watch.effects is not None):
                self.watch.report(Cause.LOGGED, f"self.{name}")
            if not self.watch.run_logging:
                return None
            effects = self.watch.effects
            with self.watch.paused():
                is_made_later = effects is not None and not effects.logged.is_supported()
            with self.watch.in_framework(), self._held_by_a_step_if(is_made_later):
                if name == "log" and effects is not None and not is_made_later:
                    args, kwargs = with_tensor(self.watch.root, args, kwargs)
                return original(*args, **kwargs)

        return log

    def _held_by_a_step_if(self, condition: bool) -> AbstractContextManager[None]:
        return self.watch.only_for_submodules() if condition else contextlib.nullcontext()
