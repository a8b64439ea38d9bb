"""Values that are another one in each batch: no Trainer, no graph."""

from __future__ import annotations

import torch

from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.runtime.changing_values import MOST_VALUES, ChangingValues


def keys(number: int) -> list[BatchDescriptor]:
    return [BatchDescriptor.from_batch((torch.ones(2), index)) for index in range(number)]


def test_values_that_never_come_again_leave_the_key():
    values = ChangingValues()
    found = [values.without_changing_values(key, (None, 0), False) for key in keys(40)]
    assert found[:MOST_VALUES] == keys(MOST_VALUES)
    assert len(set(found[MOST_VALUES:])) == 1


def test_values_that_come_again_stay_in_the_key():
    values = ChangingValues()
    for key in keys(40):
        assert values.without_changing_values(key, (None, 0), False) == key
        values.note_repeat(key)
