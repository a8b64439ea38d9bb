"""Intercept the steps of a stage at the strategy, and restore them."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy

from cg_lightning.backends import CapturedGraph
from cg_lightning.core.kernel_flags import keeps_casts
from cg_lightning.core.reasons import AUTOCAST, Reason, Status
from cg_lightning.core.stages import STEP_METHODS
from cg_lightning.core.tree import flatten
from cg_lightning.padding.padder import Padder
from cg_lightning.padding.rules import GivenRules, PadRules, ProposedRules
from cg_lightning.report.counts import Counts
from cg_lightning.report.timeline import Ran
from cg_lightning.runtime.padded_pieces import PaddedPieces
from cg_lightning.runtime.padded_steps import PaddedSteps
from cg_lightning.runtime.seen_shapes import hint
from cg_lightning.runtime.session import Session
from cg_lightning.runtime.step_runner import StepRunner
from cg_lightning.trainer.batch_transfer import Transfer
from cg_lightning.trainer.prediction_copies import PredictionCopies
from cg_lightning.trainer.redirection import run_in_wrapper

_CONTEXTS = {
    "validate": "val_step_context",
    "test": "test_step_context",
    "predict": "predict_step_context",
}
"""The context of the precision plugin that Lightning's strategies enter around a step."""
_BOUND_ALIKE = (types.FunctionType, staticmethod, classmethod, functools.partialmethod)
"""Kinds of methods that give an equal callable at each access."""


class Installation:
    """Runs the steps of one LightningModule under one strategy.

    Lightning's loops call ``strategy.validation_step(...)`` and its siblings. During a stage, the
    strategy *object* has an attribute of that name. It does the same as Lightning's method, but
    runs a :class:`StepRunner` instead of the LightningModule's step. So neither the module nor its
    class is changed.

    Args:
        strategy: The strategy of the Trainer.
        module: The LightningModule.
        session: The runtime state of the module.
        transfers: Move and note batches and predictions during a stage, in this order.
    """

    def __init__(
        self,
        strategy: Strategy,
        module: LightningModule,
        session: Session,
        transfers: Sequence[Transfer] = (),
    ) -> None:
        self.module = module
        self.session = session
        self._strategy = strategy
        self._transfers = transfers
        copies = [each for each in transfers if isinstance(each, PredictionCopies)]
        self._predictions = copies[0] if copies else None
        self._runners: dict[str, StepRunner] = {}
        self._definitions: dict[str, Any] = {}
        self._stage: str | None = None
        self._hinted: set[str] = set()

    def install(self, stage: str) -> None:
        """Intercept the step of ``stage``; idempotent."""
        if self._stage is not None:
            return
        self._prepare(stage)
        self.session.install()
        self._stage = stage
        vars(self._strategy)[STEP_METHODS[stage]] = functools.partial(self._run_step, stage)
        for transfer in self._transfers:
            transfer.install()

    def graphs(self, mode: str) -> list[CapturedGraph]:
        """Return the stored graphs of one mode."""
        return self.session.graphs(mode)

    def hint(self, stage: str) -> str:
        """Return a hint about the shapes of a stage; empty if there is none, or none since."""
        said = "" if stage in self._hinted else hint(self.session, stage)
        if said:  # fit ends many validations
            self._hinted.add(stage)
        return said

    def check_sanity_batch(self, batch: Any) -> None:
        """Check that ``pad_dims`` fits a batch of the sanity check, before an epoch of training.

        Raises:
            ValueError: A rule does not fit the batch.
        """
        settings = self.session.settings
        if "validate" in settings.stages and settings.runtime_policy.has_piecewise_cudagraphs():
            GivenRules(settings.pad_rules).of(batch, flatten(batch)[0])

    def complete_predictions(self) -> None:
        """Wait for all predictions, before Lightning returns them; idempotent."""
        if self._predictions is not None:
            self._predictions.remove()

    def remove(self, check: bool = True) -> None:
        """Restore the step; idempotent. ``check`` is as in :meth:`Session.remove`."""
        if self._stage is not None:
            vars(self._strategy).pop(STEP_METHODS[self._stage], None)
            self._stage = None
            for transfer in reversed(self._transfers):
                transfer.remove()
            self.session.remove(check)

    def close(self) -> None:
        """Restore the step, and drop all graphs."""
        self.remove(check=False)
        self.session.close()
        self._runners.clear()
        self._definitions.clear()

    def _prepare(self, stage: str) -> None:
        """Make the runner of a stage, unless an earlier validation inside fit has made it."""
        name = STEP_METHODS[stage]
        definition = _definition(self.module, name)
        if stage in self._runners and self._definitions[stage] is definition:
            return
        if stage in self._runners:  # the user has replaced the step
            self.session.remove()  # raises the errors of deferred checks
            self.session.close()
            self._runners.clear()
            self._definitions.clear()
        step = _step(self.module, name)
        padded = self._padded_steps(stage, name, step)
        self._runners[stage] = StepRunner(self.session, stage, name, step, padded=padded)
        self._definitions[stage] = definition

    def _padded_steps(self, stage: str, name: str, step: Callable[..., Any]) -> PaddedSteps | None:
        settings = self.session.settings
        if not settings.pads:
            return None
        rules: PadRules = GivenRules(settings.pad_rules)
        if settings.proposes_pad_dims:
            rules = ProposedRules(self.session.stats.proposed_pad_dims)
        padder = Padder(settings.capture_sizes or (), rules)
        has_pieces = settings.runtime_policy.has_piecewise_cudagraphs()
        pieces = PaddedPieces(self.session, stage, rules) if has_pieces else None
        is_whole = stage == "predict"  # other steps reduce over the batch
        return PaddedSteps(self.session, stage, name, step, padder, is_whole, pieces)

    def _run_step(self, stage: str, *args: Any, **kwargs: Any) -> Any:
        """Do what ``Strategy.validation_step`` does."""
        name, strategy = STEP_METHODS[stage], self._strategy
        if strategy.lightning_module is not self.module:  # a callback has exchanged it
            return getattr(type(strategy), name)(strategy, *args, **kwargs)
        if _definition(self.module, name) is not self._definitions[stage]:
            self._prepare(stage)
            self.session.install()
        runner = self._runners[stage]
        run: Callable[..., Any] = runner.run
        if self._predictions is not None and stage == "predict":
            run = functools.partial(_run_and_tell, runner, self._predictions)
        if keeps_casts(self.session.backend.device.type):  # before the Trainer's own autocast
            run = functools.partial(runner.run_as_it_is, reason=AUTOCAST)
        with getattr(strategy.precision_plugin, _CONTEXTS[stage])():
            wrapper = strategy.model
            if wrapper is None or wrapper is strategy.lightning_module:
                return run(args, kwargs)
            # DDP broadcasts buffers in its forward, where all ranks must meet
            step = functools.partial(_run_all, run)
            return run_in_wrapper(strategy, self.module, name, step, *args, **kwargs)


class InertInstallation:
    """Counts the steps of a Trainer that allows no graphs. All steps run as without the callback.

    Args:
        strategy: The strategy of the Trainer.
        stats: Counts.
        why: Why nothing can run from graphs.
    """

    def __init__(self, strategy: Strategy, stats: Counts, why: str) -> None:
        self._strategy = strategy
        self._stats = stats
        self.why = why
        self._reason = Reason(Status.INERT, why)
        self._stage: str | None = None

    def install(self, stage: str) -> None:
        """Count the steps of ``stage`` from now on; idempotent.

        If the user has set an attribute of that name, it stays and nothing is counted.
        """
        name = STEP_METHODS[stage]
        if self._stage is None and name not in vars(self._strategy):
            self._stage = stage
            vars(self._strategy)[name] = functools.partial(self._run_step, stage)

    def graphs(self, mode: str) -> list[CapturedGraph]:
        """Return an empty list, because there are no graphs."""
        return []

    def hint(self, stage: str) -> str:
        """Return nothing: no shape would run from a graph."""
        return ""

    def remove(self) -> None:
        """Restore the step; idempotent."""
        if self._stage is not None:
            vars(self._strategy).pop(STEP_METHODS[self._stage], None)
            self._stage = None

    close = remove

    def _run_step(self, stage: str, *args: Any, **kwargs: Any) -> Any:
        step = getattr(type(self._strategy), STEP_METHODS[stage])
        began = perf_counter()
        output = step(self._strategy, *args, **kwargs)
        self._stats.timeline.add(stage, Ran.EAGER, began, self._reason)
        self._stats.ran(stage, "NONE", "-", self._reason)
        return output


def _run_and_tell(
    runner: StepRunner, predictions: PredictionCopies, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    outcome = runner.run_with_outcome(args, kwargs)
    predictions.is_replayed = outcome.ran is Ran.REPLAY
    return outcome.output


def _run_all(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return run(args, kwargs)


def _definition(module: LightningModule, name: str) -> Any:
    """Return the definition of a method, because bound methods are new objects at each access."""
    if name in module.__dict__:
        return module.__dict__[name]
    for cls in type(module).__mro__:  # each step comes here, and a generator takes three times
        if name in cls.__dict__:
            return cls.__dict__[name]
    return None


def _step(module: LightningModule, name: str) -> Callable[..., Any]:
    """Return a callable that runs the step as Lightning does, which looks it up for each batch."""
    step: Callable[..., Any] = getattr(module, name)
    if name in vars(module) or isinstance(_definition(module, name), _BOUND_ALIKE):
        return step

    @functools.wraps(step)
    def look_up_and_run(*args: Any, **kwargs: Any) -> Any:
        return getattr(module, name)(*args, **kwargs)

    return look_up_and_run
