"""Real text whose lengths vary: the docstrings of Python's standard library."""

from __future__ import annotations

import argparse
import asyncio
import collections
import inspect
import logging
import pathlib
import statistics
import subprocess
import unittest
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

_MODULES = (argparse, asyncio, collections, logging, pathlib, statistics, subprocess, unittest)


class DocstringData(LightningDataModule):
    """Batches of docstrings, padded to the longest of each batch. A token is a byte.

    Args:
        batch_size: Number of texts in a batch.
        most_tokens: Longer texts are cut.
    """

    def __init__(self, batch_size: int = 8, most_tokens: int = 512) -> None:
        super().__init__()
        self._batch_size = batch_size
        self._most_tokens = most_tokens

    def predict_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        """Return a loader of dictionaries with ``input_ids`` and ``attention_mask``."""
        texts: Any = [text.encode()[: self._most_tokens] for text in docstrings()]
        return torch.utils.data.DataLoader(
            texts, batch_size=self._batch_size, collate_fn=padded_to_the_longest
        )

    val_dataloader = test_dataloader = predict_dataloader


def padded_to_the_longest(texts: list[bytes]) -> dict[str, Tensor]:
    """Return token ids and a mask of shape ``(texts, longest)``."""
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor(list(text))
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def docstrings() -> list[str]:
    """Return the docstrings of functions and classes of some modules, each text once."""
    found: dict[str, None] = {}
    for module in _MODULES:
        for _, value in inspect.getmembers(module, callable):
            members = [value, *(member for _, member in inspect.getmembers(value, callable))]
            texts = [inspect.getdoc(member) for member in members if _is_of_library(member)]
            found.update(dict.fromkeys(text for text in texts if text))
    return list(found)


def _is_of_library(value: Any) -> bool:
    return inspect.isfunction(value) or inspect.isclass(value)
