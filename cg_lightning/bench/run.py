"""Measures all contestants on all cases."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import nn
from torch.utils.data import DataLoader

from cg_lightning.backends import GraphBackend, resolve_backend
from cg_lightning.bench.cases import CASES, Case
from cg_lightning.bench.contestants import CONTESTANTS, OTHER_ORDER, make
from cg_lightning.bench.measure import STAGES, Figures, Settings, run_once
from cg_lightning.core.equality import same_leaf
from cg_lightning.core.settings import check_names

_DIFFERENT = 8
"""Batches that differ from one another; they are given in turn."""


def loader(case: Case, settings: Settings, device: torch.device) -> DataLoader[Any]:
    """Gives batches that lie on ``device``."""
    different = [tuple(part.to(device) for part in case.batch(seed)) for seed in range(_DIFFERENT)]
    in_turn = itertools.islice(itertools.cycle(different), settings.warmup + settings.batches)
    return DataLoader(list(in_turn), batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


def _check(name: str, figures: Figures, eager: Figures) -> None:
    for key, value in eager.values.items():
        if name in OTHER_ORDER:
            torch.testing.assert_close(figures.values[key], value, rtol=1e-2, atol=1e-2)
        elif not same_leaf(figures.values[key], value):
            raise AssertionError(f"{name}: {key} is {figures.values[key]}, eager's is {value}")


def backend_to_measure(name: str) -> GraphBackend:
    """Gives the backend of that name.

    Raises:
        ValueError: The name is unknown, or there is no CUDA device.
    """
    backend = resolve_backend(name)
    if backend is None:
        raise ValueError(
            "task=bench needs a CUDA device; backend=recorder runs it without one, and measures nothing of use."
        )
    return backend


def measure_case(
    name: str,
    stages: Sequence[str],
    contestants: Sequence[str],
    settings: Settings,
    backend: GraphBackend,
) -> Iterator[tuple[str, dict[str, Figures | str]]]:
    """Gives, stage by stage, figures by contestant; the error in words where one does not run.

    Raises:
        AssertionError: A contestant that is ours logged another number than eager.
    """
    case = CASES[name]
    torch.compiler.reset()  # else the networks of other cases count towards its limit of recompilations
    seed_everything(0, verbose=False)
    net = case.network().eval()
    settings = dataclasses.replace(
        settings, batches=min(settings.batches, case.most_batches or settings.batches)
    )
    data = loader(case, settings, backend.device)
    made: dict[str, Any] = {}
    for stage in stages:
        yield stage, _measure_stage(stage, net, data, made, contestants, settings, backend)


def _measure_stage(
    stage: str, net: nn.Module, data: DataLoader[Any], made: dict[str, Any], contestants: Sequence[str], settings: Settings,
    backend: GraphBackend,
) -> dict[str, Figures | str]:  # fmt: skip
    sample = data.dataset[0][0]
    results: dict[str, Figures | str] = {}
    for _ in range(settings.rounds):
        for contestant in contestants:
            if isinstance(results.get(contestant), str):
                continue
            try:
                if contestant not in made:
                    made[contestant] = make(contestant, net, sample, backend.name)
                figures = results.setdefault(contestant, Figures([], [], {}))
                assert isinstance(figures, Figures)
                module, callbacks = made[contestant]
                run_once(stage, module, callbacks, data, settings, backend, figures)
            except Exception as error:
                if contestant not in OTHER_ORDER:
                    raise
                results[contestant] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    eager = results.get("eager")
    for contestant, figures in results.items():
        if (
            isinstance(figures, Figures)
            and isinstance(eager, Figures)
            and contestant not in ("loop", "eager")
        ):
            _check(contestant, figures, eager)
    return results


def measure(
    cases: Sequence[str],
    contestants: Sequence[str],
    stages: Sequence[str],
    settings: Settings,
    backend_name: str,
) -> Iterator[dict[str, Any]]:
    """Gives one record for each case, stage and contestant, as soon as a case is done.

    Raises:
        ValueError: A name is unknown.
    """
    check_names("bench.cases", cases, tuple(CASES))
    check_names("bench.contestants", contestants, tuple(CONTESTANTS))
    check_names("bench.stages", stages, STAGES)
    backend = backend_to_measure(backend_name)
    for case in cases:
        for stage, results in measure_case(case, stages, contestants, settings, backend):
            for contestant, figures in results.items():
                yield {"case": case, "stage": stage, "contestant": contestant, **_record(figures)}


def _record(figures: Figures | str) -> dict[str, Any]:
    if isinstance(figures, str):
        return {"error": figures}
    return {
        "microseconds": round(figures.median, 1),
        "spread": round(figures.spread, 1),
        "replay": round(min(figures.replays), 1) if figures.replays else None,
        "mode": figures.mode,
        "capture_milliseconds": round(figures.capture_milliseconds, 1),
        "values": {key: float(value.float().mean()) for key, value in figures.values.items()},
    }
