"""Nested batches: flatten, paths, rebuild."""

import collections
import copy
import dataclasses
import types

import pytest
import torch

from cg_lightning.core.tree import flatten, leaf_paths, rebuild
from tests.test_descriptor import Encoding, Pair, Record


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: int
    y: tuple = ()


@pytest.mark.parametrize(
    ("tree", "paths"),
    [
        (1, ["batch"]),
        ((1, [2, {"a": 3}]), ["batch[0]", "batch[1][0]", "batch[1][1]['a']"]),
        (Pair(1, 2), ["batch[0]", "batch[1]"]),
        (Record(1, 2), ["batch.x", "batch.n"]),
        (Frozen(1, (2,)), ["batch.x", "batch.y[0]"]),
        (Encoding(ids=1, mask=2), ["batch['ids']", "batch['mask']"]),
        (collections.OrderedDict(a=1), ["batch['a']"]),
        (collections.defaultdict(list, a=1), ["batch['a']"]),
        (types.MappingProxyType({"a": 1}), ["batch"]),
        (torch.Size((1, 2)), ["batch[0]", "batch[1]"]),
        ((), []),
    ],
)
def test_flatten_paths_and_rebuild(tree, paths):
    leaves, _ = flatten(tree)
    assert leaf_paths(tree) == paths
    again = rebuild(tree, iter(leaves))
    assert again == tree
    assert type(again) is type(tree)


def test_what_a_mapping_carries_beside_its_items_is_kept():
    encoding = Encoding(ids=1)
    encoding.extra = "kept"
    again = rebuild(encoding, iter([2]))
    assert (again["ids"], again.extra, encoding["ids"]) == (2, "kept", 1)
    assert rebuild(collections.defaultdict(list, a=1), iter([2]))["missing"] == []


def test_model_output_of_transformers():
    outputs = pytest.importorskip(
        "transformers.modeling_outputs", reason="transformers is not installed"
    )
    tree = outputs.BaseModelOutput(
        last_hidden_state=torch.zeros(1), hidden_states=(torch.ones(1), torch.ones(2))
    )
    again = rebuild(rebuild(tree, iter([None] * 3)), iter(flatten(tree)[0]))
    assert type(again) is type(tree)
    assert again.last_hidden_state is tree.last_hidden_state
    assert again["hidden_states"][1] is tree.hidden_states[1]


@dataclasses.dataclass
class Output(collections.OrderedDict):
    """As an output of transformers: a copy has its items in the order of the fields."""

    first: int | None = None
    second: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)

    def __reduce__(self):
        make, _, *rest = super().__reduce__()
        return (make, tuple(getattr(self, field.name) for field in dataclasses.fields(self)), *rest)


def test_items_keep_their_order():
    output = Output(second=2)
    output["first"] = output.first = 1
    tree = {"inner": output}
    assert list(output) != list(copy.copy(output))  # or else this shows nothing
    assert list(rebuild(tree, iter([20, 10]))["inner"].items()) == [("second", 20), ("first", 10)]
    assert flatten(rebuild(tree, iter([20, 10]))) == ([20, 10], flatten(tree)[1])
