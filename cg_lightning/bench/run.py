"""Measures every contestant on every case."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cg_lightning.backends import GraphBackend, resolve_backend
from cg_lightning.bench.cases import CASES, Case, check_cases
from cg_lightning.bench.contestants import CONTESTANTS, LOOPS, OTHER_ORDER, make
from cg_lightning.bench.measure import STAGES, Measurement, Settings, batches_in_turn, run_once
from cg_lightning.bench.training import TRAINERS, begin_again, compared_weights, make_trained
from cg_lightning.core.equality import same_leaf
from cg_lightning.core.settings import check_names
from cg_lightning.core.stages import TRAIN

_DISTINCT_BATCHES = 8
"""Number of different batches. The loader repeats them in turn."""


def loader(case: Case, settings: Settings, device: torch.device) -> DataLoader[Any]:
    """Return a loader of batches that are where the settings say."""
    place: dict[str, Callable[[Tensor], Tensor]] = {
        "device": lambda part: part.to(device),
        "host": lambda part: part,
        "pinned": lambda part: part.pin_memory(),
    }
    put = place[settings.batches_on]
    distinct = [tuple(map(put, case.batch(seed))) for seed in range(_DISTINCT_BATCHES)]
    return batches_in_turn(distinct, settings.warmup + settings.batches)


def _check(name: str, measurement: Measurement, eager: Measurement) -> None:
    for key, value in eager.values.items():
        own = measurement.values[key]
        if name in OTHER_ORDER:
            torch.testing.assert_close(own, value, rtol=1e-2, atol=1e-2)
        elif not same_leaf(own, value):
            raise AssertionError(f"{name}: {key} is {own}, eager's is {value}")


def backend_to_measure(name: str, task: str = "bench") -> GraphBackend:
    """Return the backend of that name, for a task of the command.

    Raises:
        ValueError: The name is unknown, or there is no CUDA device.
    """
    backend = resolve_backend(name)
    if backend is None:
        raise ValueError(
            f"task={task} needs a CUDA device. bench.backend=recorder runs it without one, "
            "but the times mean nothing."
        )
    return backend


def check(
    cases: Sequence[str], contestants: Sequence[str], stages: Sequence[str], backend_name: str
) -> GraphBackend:
    """Return the backend to measure on, if everything that is asked for is there.

    Raises:
        ValueError: A name is unknown, no contestant can train, the library of a case is not
            installed, or there is no CUDA device.
    """
    check_cases(cases)
    check_names("bench.contestants", contestants, tuple(CONTESTANTS))
    check_names("bench.stages", stages, STAGES)
    if TRAIN in stages and not set(contestants) & set(TRAINERS):
        raise ValueError(
            f"bench.stages=[train]: {', '.join(contestants)} cannot train; "
            f"bench.contestants needs one of {', '.join(TRAINERS)}"
        )
    return backend_to_measure(backend_name)


def measure_case(
    name: str,
    stages: Sequence[str],
    contestants: Sequence[str],
    settings: Settings,
    backend: GraphBackend,
) -> Iterator[tuple[str, dict[str, Measurement | str]]]:
    """Yield each stage with its measurements by contestant; an error message if a peer failed.

    Raises:
        AssertionError: One of our own contestants logged another value than eager.
    """
    case = CASES[name]
    torch.compiler.reset()  # earlier cases would count towards the limit of recompilations
    seed_everything(0, verbose=False)
    net = case.network().eval()
    settings = dataclasses.replace(
        settings, batches=min(settings.batches, case.max_batches or settings.batches)
    )
    data = loader(case, settings, backend.device)
    evaluated: dict[str, Any] = {}
    for stage in stages:
        names, made = contestants, evaluated
        if stage == TRAIN:
            names, made = [name for name in contestants if name in TRAINERS], {}
        yield stage, _measure_stage(stage, net, data, made, names, settings, backend)


def _measure_stage(
    stage: str, net: nn.Module, data: DataLoader[Any], made: dict[str, Any],
    contestants: Sequence[str], settings: Settings, backend: GraphBackend,
) -> dict[str, Measurement | str]:  # fmt: skip
    """Run all rounds. In training, each begins with the same weights."""
    sample = data.dataset[0][0].to(backend.device)
    trains = stage == TRAIN
    results: dict[str, Measurement | str] = {}
    first_weights: list[Tensor] = []
    for _ in range(settings.rounds):
        for contestant in contestants:
            measurement = results.setdefault(contestant, Measurement([], [], {}))
            if isinstance(measurement, str):
                continue
            try:
                if contestant not in made:
                    make_one = make_trained if trains else make
                    made[contestant] = make_one(contestant, net, sample, backend.name)
                module, callbacks = made[contestant]
                if trains:
                    begin_again(module, net)
                run_once(stage, module, callbacks, data, settings, backend, measurement)
            except Exception as error:
                if contestant not in OTHER_ORDER:
                    raise
                words = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                results[contestant] = words
            if contestant == "eager" and not first_weights:
                first_weights = measurement.weights
    eager = results.get("eager")
    for contestant, result in results.items():
        if isinstance(result, str) or not isinstance(eager, Measurement) or contestant in LOOPS:
            continue
        if not trains:
            _check(contestant, result, eager)
        elif result.weights is not first_weights:  # one round of eager is not compared with itself
            result.against_eager = compared_weights(result.weights, first_weights)
    return results


def measure(
    cases: Sequence[str],
    contestants: Sequence[str],
    stages: Sequence[str],
    settings: Settings,
    backend_name: str,
) -> Iterator[dict[str, Any]]:
    """Yield one record for each case, stage and contestant, as soon as a stage is measured.

    Raises:
        ValueError: See :func:`check`.
    """
    backend = check(cases, contestants, stages, backend_name)
    for case in cases:
        for stage, results in measure_case(case, stages, contestants, settings, backend):
            for contestant, result in results.items():
                yield {"case": case, "stage": stage, "contestant": contestant, **_record(result)}


def _record(result: Measurement | str) -> dict[str, Any]:
    if isinstance(result, str):
        return {"error": result}
    return {
        "microseconds": round(result.median, 1),
        "spread": round(result.spread, 1),
        "replay": round(min(result.replays), 1) if result.replays else None,
        "mode": result.mode,
        "capture_milliseconds": round(result.capture_milliseconds, 1),
        "values": {key: float(value.float().mean()) for key, value in result.values.items()},
        **result.against_eager,
    }
