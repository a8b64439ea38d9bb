"""The hunt: small steps that hold, change or emit something, each with and without the callback.

Everything that a user can see is compared. hunt_cases.py has the rows, hunt_modes.txt the modes
that they reach.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import random
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.connectors import callback_connector

from cg_lightning import CUDAGraphCallback
from tests import hunt_cases, hunt_public
from tests.harness import Harness
from tests.hunt_cases import Row
from tests.hunt_picture import difference, picture

HERE = Path(__file__).parent
ROWS = {row.name: row for row in hunt_cases.rows()}
FULL, PIECEWISE = "FULL_AND_PIECEWISE", "PIECEWISE"
SETTINGS = {
    # PIECEWISE has only the Linear to capture where the step itself does the thing
    "in the step": [(FULL, 2), (FULL, 0), (PIECEWISE, 0)],
    "in a part": [(FULL, 2), (FULL, 0), (PIECEWISE, 2), (PIECEWISE, 0)],
}
"""Mode, and ``verify_replays``."""
EXHAUSTIVE = {"in the step": [(PIECEWISE, 0)], "in a part": [(FULL, 2), (PIECEWISE, 2)]}
"""Those that run with ``-m exhaustive`` only, and on a GPU."""
ALTERNATING = [
    {"in the step": [(FULL, 2)], "in a part": [(FULL, 0)]},
    {"in the step": [(FULL, 0)], "in a part": [(PIECEWISE, 0), (FULL, 0)]},
]
"""The same for every second pair of rows: each pair does one thing in the step, and in a part."""
Printed = Callable[[], Any]


class Sees(Callback):
    """Pictures of outputs and batches after their step; and both as they are at the end."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.pictures: list[Any] = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_: Any) -> None:
        self.kept.append((outputs, batch))
        self.pictures.append(picture((outputs, batch)))

    on_predict_batch_end = on_validation_batch_end


class Keeps(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def reset() -> None:
    """The world as it is at the start of a run."""
    hunt_cases.reset()
    for name in environment():
        del os.environ[name]
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("HUNT_")}


def files(folder: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def frames(error: BaseException) -> list[str]:
    return [
        f"{frame.name}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename in (hunt_cases.__file__, hunt_public.__file__)
    ]


def run(
    row: Row, harness: Harness, folder: Path, printed: Printed, *extra: Callback
) -> dict[str, Any]:
    """Run a row; returns everything that a user sees, by its name."""
    folder.mkdir()
    before = Path.cwd()
    os.chdir(folder)
    reset()
    sees, lines, result, error = Sees(), Keeps(), None, None
    hunt_cases.logger.addHandler(lines)
    hunt_cases.logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with torch.device("cuda" if harness.backend == "cuda" else "cpu"):
                module = row.make()
            trainer = harness.trainer(*extra, sees)
            printed()
            try:
                if row.stage == "predict":
                    result = trainer.predict(module, row.loader())
                else:
                    result = trainer.validate(module, row.loader(), verbose=False)
            except Exception as caught:
                error = (type(caught).__name__, str(caught), len(sees.pictures), frames(caught))
            out, err = printed()
        random_states = (
            random.getstate(),
            picture(np.random.get_state()),
            picture(torch.get_rng_state()),
        )
        return {
            "exception": error,
            "batches and outputs as a callback sees them": sees.pictures,
            "batches and outputs at the end": picture(sees.kept),
            "what is returned": picture(result),
            "metrics": picture(dict(trainer.callback_metrics)),
            "module": picture(module),
            "environment": environment(),
            "standard output": out,
            "standard error": err,
            "log": lines.lines,
            "warnings": [str(each.message) for each in warned if "user:" in str(each.message)],
            "files": files(folder),
            "random states": random_states,
            "world": picture(hunt_cases.world()),
        }
    finally:
        hunt_cases.logger.removeHandler(lines)
        os.chdir(before)
        reset()


def steps_of(callback: CUDAGraphCallback) -> str:
    return " ".join(f"{mode}={steps}" for mode, steps in callback.stats.steps.items() if steps)


@dataclasses.dataclass(frozen=True)
class Expected:
    """A line of hunt_modes.txt."""

    steps: dict[int, str]
    """By ``verify_replays``, for FULL_AND_PIECEWISE."""
    different: dict[tuple[str, int], str]
    """What is another one than in eager today, by setting."""

    @classmethod
    def from_line(cls, line: str) -> Expected:
        _, verified, unverified, different = (part.strip() for part in line.split("|"))
        found = {}
        for each in filter(None, different.split("; ")):
            setting, what = each.split(": ")
            mode, verify_replays = setting.split()
            found[mode, int(verify_replays)] = what
        return cls({2: verified, 0: unverified}, found)

    def to_line(self, name: str) -> str:
        different = [f"{mode} {verify}: {what}" for (mode, verify), what in self.different.items()]
        return f"{name} | {self.steps[2]} | {self.steps[0]} | {'; '.join(different)}".rstrip()


TABLE = {
    line.split(" | ")[0]: Expected.from_line(line)
    for line in (HERE / "hunt_modes.txt").read_text().splitlines()
    if not line.startswith("#")
}


_eager: dict[tuple[str, str], dict[str, Any]] = {}


def eager(row: Row, harness: Harness, folder: Path, printed: Printed) -> dict[str, Any]:
    """What a run without the callback shows; one run serves all settings."""
    key = (row.name, harness.backend)
    if key not in _eager:
        _eager[key] = run(row, harness, folder, printed)
    return _eager[key]


@pytest.mark.parametrize(
    ("name", "mode", "verify_replays"),
    [
        pytest.param(
            *(row.name, *setting),
            marks=pytest.mark.exhaustive
            if setting in EXHAUSTIVE[row.side] or setting in ALTERNATING[index // 2 % 2][row.side]
            else (),
        )
        for index, row in enumerate(ROWS.values())
        for setting in SETTINGS[row.side]
    ],
)
def test_a_user_sees_what_eager_shows(
    request, harness: Harness, tmp_path, capfd, name, mode, verify_replays
):
    """Hazards 6, 35, 36, 37, 38 and 47. The modes that are reached are those of hunt_modes.txt."""
    row, expected = ROWS[name], TABLE[name]
    known = expected.different.get((mode, verify_replays))
    if known:
        strict = harness.backend == "recorder"
        request.applymarker(pytest.mark.xfail(reason=known, raises=AssertionError, strict=strict))
    callback = harness.callback(mode=mode, verify_replays=verify_replays)
    one = eager(row, harness, tmp_path / "eager", capfd.readouterr)
    other = run(row, harness, tmp_path / "callback", capfd.readouterr, callback)
    assert not difference(one, other), difference(one, other)
    # hunt_modes.txt is for the recorder; what is different today has no mode to keep
    if mode == FULL and not expected.different and harness.backend == "recorder":
        assert steps_of(callback) == expected.steps[verify_replays], callback.summary()


def test_the_table_has_every_row():
    """hunt_modes.txt has a line for each row.

    Make it with ``python -m tests.test_hunt > tests/hunt_modes.txt``, and read the changes.
    """
    assert len(ROWS) >= 150
    assert list(TABLE) == list(ROWS)


def test_harmless_steps_are_full():
    harmless = {name: line for name, line in TABLE.items() if name.startswith("harmless")}
    assert len(harmless) >= 30
    lower = [
        name for name, line in harmless.items() if set(line.steps.values()) != {"NONE=3 FULL=5"}
    ]
    assert not lower


SEEN_IN = {
    "prints": "standard output",
    "logs": "log",
    "warns": "warnings",
    "appends_to_a_file": "files",
    "puts_an_environment_variable": "environment",
    "draws_by_random": "batches and outputs as a callback sees them",
    "draws_by_numpy_unused": "random states",
    "builds_a_cache_once": "module",
    "takes_its_time_from_a_counter": "world",
    "raises_at_once": "exception",
    "returns_its_tensor": "what is returned",
    "keeps_it": "module",
    "adds_a_key": "batches and outputs at the end",
}


@pytest.mark.parametrize("name", SEEN_IN)
def test_the_comparison_can_fail(tmp_path, capfd, name):
    """A step that does it is told from one that does not, where a user would see it."""
    harness = Harness("recorder", tmp_path)
    does = getattr(hunt_cases, name)
    of_batch = does in hunt_cases.OF_DICTS
    owners = hunt_cases.OWNERS_OF_BATCH if of_batch else hunt_cases.OWNERS
    start = hunt_cases.start_once if name == "builds_a_cache_once" else lambda self: None

    def does_not(self: Any, x: Any) -> Any:
        return self.linear(x["x"]) if of_batch else x

    seen = []
    for work in (does, does_not):
        (row,) = hunt_cases.of_functions("", [(start, work)], owners, sides=["in the step"])
        row = dataclasses.replace(row, stage="predict")
        seen.append(run(row, harness, tmp_path / work.__name__, capfd.readouterr))
    assert difference(seen[0][SEEN_IN[name]], seen[1][SEEN_IN[name]])


@pytest.mark.parametrize("use", hunt_cases.ALL_USES, ids=lambda use: use.name)
def test_a_picture_shows_each_change(tmp_path, monkeypatch, use):
    """Two new objects are alike; one that a step has used differs, or the step's output does."""
    monkeypatch.chdir(tmp_path)
    assert not difference(picture(use.make()), picture(use.make()))
    x = torch.ones(1, 4)
    held = use.make()
    outputs = []
    for _ in range(2):
        outputs.append(picture(use.use(held, x)))
        held = held if use.change is None else use.change(held, x)
    assert difference(picture(use.make()), picture(held)) or difference(*outputs)


class Descriptors:
    """Standard output and error of this process, as capfd has them."""

    def __init__(self) -> None:
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        for number, file in enumerate(self._files, start=1):
            os.dup2(file.fileno(), number)

    def __call__(self) -> Any:
        sys.stdout.flush()
        sys.stderr.flush()
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read())
            file.seek(0)
            file.truncate()
        return texts


def main() -> None:
    """Print hunt_modes.txt as it is today."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    callback_connector._load_external_callbacks = lambda group: []
    table = os.fdopen(os.dup(1), "w")
    printed = Descriptors()
    print(
        "# row | steps by mode, FULL_AND_PIECEWISE, verify_replays=2 | =0 | different", file=table
    )
    with tempfile.TemporaryDirectory() as top:
        harness, numbers = Harness("recorder", Path(top)), itertools.count()
        for name, row in ROWS.items():
            one = run(row, harness, Path(top) / f"{next(numbers)}", printed)
            steps, different = {}, {}
            for mode, verify_replays in SETTINGS[row.side]:
                callback = harness.callback(mode=mode, verify_replays=verify_replays)
                other = run(row, harness, Path(top) / f"{next(numbers)}", printed, callback)
                what = [key for key in one if one[key] != other[key]]
                if what:
                    different[mode, verify_replays] = ", ".join(what)
                if mode == FULL:
                    steps[verify_replays] = steps_of(callback)
            print(Expected(steps, different).to_line(name), file=table, flush=True)


if __name__ == "__main__":
    main()
