"""Locale and time zone of the process, which decide how Python writes numbers and reads dates."""

from __future__ import annotations

import datetime
import locale
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.harness import Harness, predict
from tests.test_changes_in_mid_stage import Changes, Part, Runs
from tests.test_closed_world import reasons

SETTINGS = [{"verify_replays": 0}, {"mode": "PIECEWISE", "verify_replays": 0}]
DAY = datetime.datetime(2024, 5, 6, 7, 8)
NUMBER = 1234567
SPEC = "n"
OTHER = {"locale": "C.UTF-8"}


@pytest.fixture(scope="module", autouse=True)
def german(tmp_path_factory) -> Iterator[None]:
    """Make a locale that groups digits, where the system can; otherwise use one that it has."""
    where = tmp_path_factory.mktemp("locales")
    with pytest.MonkeyPatch.context() as patch:
        if shutil.which("localedef") and os.path.exists("/usr/share/i18n/locales/de_DE"):
            command = ["localedef", "-i", "de_DE", "-f", "UTF-8", where / "de_DE.UTF-8"]
            subprocess.run(command, check=True, capture_output=True)
            patch.setenv("LOCPATH", str(where))
            patch.setitem(OTHER, "locale", "de_DE.UTF-8")
        yield


@pytest.fixture(autouse=True)
def kept() -> Iterator[None]:
    before, zone = locale.setlocale(locale.LC_ALL), os.environ.get("TZ")
    yield
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOCPATH", raising=False)  # the system's own locales are not there
        locale.setlocale(locale.LC_ALL, before)
    os.environ.pop("TZ", None)
    os.environ.update({} if zone is None else {"TZ": zone})
    time.tzset()


def language(_: Any, is_on: bool) -> None:
    locale.setlocale(locale.LC_ALL, OTHER["locale"] if is_on else "C")


def zone(_: Any, is_on: bool) -> None:
    os.environ["TZ"] = "Asia/Tokyo" if is_on else "UTC"
    time.tzset()


def runs(
    harness: Harness, use: Callable[[Any, Tensor], Tensor], change: Any, **settings: Any
) -> tuple[Any, bool]:
    """Compare with eager; return the callback, and whether the change makes a difference."""
    callback = harness.callback(warmup_steps=1, **settings)
    loader = DataLoader(TensorDataset(torch.ones(48, 8)), batch_size=4)
    module = Runs(Part(lambda: DAY, use))
    seen = []
    for extra in ([callback], []):
        change(module.part, False)
        seen.append(
            predict(loader)(harness.trainer(*extra, Changes(change)), module),
        )
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one, other), reasons(callback)
    return callback, not torch.equal(seen[1][0], seen[1][7])


def _number(text: str) -> float:
    """Return another number for each text."""
    return float(sum(index * ord(each) for index, each in enumerate(text, 1))) / 1e3


FORMATS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "f-string": lambda self, x: x * _number(f"{NUMBER:n}"),
    "computed": lambda self, x: x * _number(f"{NUMBER:{SPEC}}"),
    "format": lambda self, x: x * _number(format(NUMBER, "n")),
    "method": lambda self, x: x * _number("{:n}".format(NUMBER)),  # noqa: UP032
    "dunder": lambda self, x: x * _number(NUMBER.__format__("n")),
    "date": lambda self, x: x * _number(f"{self.held:%B %A}"),
}


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: each.get("mode", "FULL"))
@pytest.mark.parametrize("name", list(FORMATS))
def test_what_is_written_by_the_locale_is_guarded(harness, name, settings):
    callback, differs = runs(harness, FORMATS[name], language, **settings)
    assert differs or OTHER["locale"].startswith("C")
    assert callback.stats.steps[settings.get("mode", "FULL")] >= 3, callback.summary()
    assert callback.stats.captures >= 2, callback.summary()


DATES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "strftime": lambda self, x: x * _number(self.held.astimezone().strftime("%H %Z")),
    "timestamp": lambda self, x: x * (self.held.timestamp() % 100_000),
    "astimezone": lambda self, x: x * self.held.astimezone(datetime.UTC).hour,
    "fromtimestamp": lambda self, x: x * datetime.datetime.fromtimestamp(1e9).hour,
    "of date": lambda self, x: x * datetime.date.fromtimestamp(1e9 - 7200).day,
    "mktime": lambda self, x: x * (time.mktime((2024, 5, 6, 7, 8, 9, 0, 0, 0)) % 100_000),
    "localtime": lambda self, x: x * time.localtime(1e9).tm_hour,
    "name": lambda self, x: x * _number(time.tzname[0]),
    "format": lambda self, x: x * _number(f"{self.held:%s}"),
}


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: each.get("mode", "FULL"))
@pytest.mark.parametrize("name", list(DATES))
def test_what_depends_on_the_time_zone(harness, name, settings):
    _, differs = runs(harness, DATES[name], zone, **settings)
    assert differs


NAMES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "strftime": lambda self, x: x * _number(self.held.strftime("%B %A")),
    "of date": lambda self, x: x * _number(self.held.date().strftime("%B %A")),
    "of time": lambda self, x: x * _number(time.strftime("%B", (2024, 5, 6, 7, 8, 9, 0, 0, 0))),
    "locale": lambda self, x: x * _number(locale.format_string("%d", NUMBER, grouping=True)),
}


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: each.get("mode", "FULL"))
@pytest.mark.parametrize("name", list(NAMES))
def test_names_of_days_and_months(harness, name, settings):
    _, differs = runs(harness, NAMES[name], language, **settings)
    assert differs or OTHER["locale"].startswith("C")


def test_formats_without_a_locale_cost_no_guard(harness):
    callback, _ = runs(harness, lambda self, x: x * len(f"{NUMBER} {self.held}"), language)
    assert callback.stats.captures == 1, callback.summary()
