"""Forward hooks: arbitrary code around the call of a module."""

from __future__ import annotations

import contextlib
import functools
import types
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.core.lines import Elsewhere
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.watched_step import ModuleCall
from cg_lightning.guards.sources import Source
from cg_lightning.modules.attributes import global_hooks, hooks_of, profiler_of
from cg_lightning.modules.kinds import is_user_file

_OUTPUT_CAPTURING = "transformers.utils.output_capturing"
"""Its hooks fill a list of the call that is under way."""


class ForwardHooks(Detector):
    """Reports called modules that have forward hooks; global hooks belong to every module.

    Hooks that a profiler adds are told apart: the user's line did not add them.

    A graph of the whole step runs hooks when it is captured, like the code around them. So a hook
    whose code the other detectors see is no obstacle to it. The graph of a submodule would skip it.
    """

    def around_call(self, call: ModuleCall) -> AbstractContextManager[None]:
        assert call.module is not None
        modules = call.hidden or (call.module,)
        tables = [*global_hooks(), *[table for module in modules for table in hooks_of(module)]]
        if any(tables):
            profilers = {profiler_of(hook) for table in tables for hook in table.values()}
            for name in sorted(profilers - {""}):
                self.watch.report(Cause.PROFILER_HOOK, name, location=Elsewhere.NOT_YOURS)
            if "" in profilers:
                self._report(call, tables)
        return contextlib.nullcontext()

    def _report(self, call: ModuleCall, tables: list[dict[int, Any]]) -> None:
        hooks = [hook for table in tables for hook in table.values()]
        others = [hook for hook in hooks if not self._is_code_of_step(hook)]
        is_code_of_step = not (others or call.hidden or any(global_hooks()))
        around = self.watch.only_for_submodules if is_code_of_step else contextlib.nullcontext
        with around():
            self.watch.report(Cause.FORWARD_HOOK, _words(call.module, others))

    def _is_code_of_step(self, hook: Any) -> bool:
        """Whether all that a hook reads and changes is seen, as for other functions of the step."""
        if isinstance(hook, types.MethodType):
            is_of_module = any(hook.__self__ is module for _, module in self.watch.modules)
            return is_of_module and self._is_code_of_step(hook.__func__)
        if type(hook) is functools.partial:
            for name in hook.keywords:  # unlike its arguments, they can change in place
                self.watch.read(Source(hook.keywords, name, f"{name} of a partial function"))
            given = [*hook.args, *hook.keywords.values()]
            return all(map(is_plain_value, given)) and self._is_code_of_step(hook.func)
        if not isinstance(hook, types.FunctionType):
            return False
        return hook.__module__ == _OUTPUT_CAPTURING or is_user_file(hook.__code__.co_filename)


def _words(module: nn.Module | None, hooks: list[Any]) -> str:
    """Return ``Linear``, or ``WeightNorm of Linear`` for a hook that is an object."""
    objects = [
        hook for hook in hooks if not isinstance(hook, (types.FunctionType, types.MethodType))
    ]
    of_module = type(module).__name__
    return f"{type(objects[0]).__name__} of {of_module}" if objects else of_module
