"""The examples of ``docs/what-becomes-one-graph.md`` of what becomes one graph."""

from __future__ import annotations

import importlib
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import CharErrorRate

from tests.harness import Harness, predict, validate

PAGE = Path(__file__).parents[1] / "docs" / "what-becomes-one-graph.md"
SECTION = PAGE.read_text().split("## Examples")[1].split("\n## ")[0]
EXAMPLES = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
BATCHES = 16


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 2)
        self.accuracy = MulticlassAccuracy(2)
        self.errors = CharErrorRate()
        self.outputs: list[Any] = []

    def on_predict_start(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(5)


class Batches:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._x = torch.randn(BATCHES, 4, 8, generator=generator)
        self._labels = torch.randint(0, 2, (BATCHES, 4), generator=generator)

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "x": self._x[index],
            "mask": (torch.arange(4) < 3 + index % 2)[:, None].long(),
            "labels": self._labels[index],
            "names": [f"{index}-{row}.png" for row in range(4)],
        }


def test_there_is_an_example_for_each_rule():
    assert len(EXAMPLES) == 15


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_are_one_graph(harness: Harness, number: int, tmp_path, monkeypatch):
    file = tmp_path / f"example_{number}.py"  # detectors read the source
    body = textwrap.indent(EXAMPLES[number], "    ")
    base = "from tests.test_whole_steps import Model"
    file.write_text(f"import torch\n{base}\n\n\nclass Example(Model):\n{body}")
    monkeypatch.syspath_prepend(tmp_path)
    kind = importlib.import_module(file.stem).Example
    (name,) = [name for name in vars(kind) if name.endswith("_step")]
    loader = DataLoader(Batches(), batch_size=None)  # type: ignore[arg-type]
    job = predict(loader) if name == "predict_step" else validate(loader)
    callback = harness.compare(kind(), job, harness.callback(warmup_steps=1))
    assert callback.stats.steps["FULL"] >= BATCHES // 2, callback.summary()
