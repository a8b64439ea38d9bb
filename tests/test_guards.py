"""Guards of frozen values, and their explanation after a change: no Trainer, no graph."""

from __future__ import annotations

import collections
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics import SumMetric

from cg_lightning.guards import library_code, module_guard
from cg_lightning.guards.guard_set import GuardSet
from cg_lightning.guards.library_code import always_new
from cg_lightning.guards.module_guard import Change, ModuleGuard
from cg_lightning.guards.sources import MISSING, Source, shorten
from cg_lightning.guards.values import FrozenValues
from cg_lightning.guards.written_settings import WrittenSettings
from tests.models import Body

SCALE = 1.0


class Scaled(nn.Module):
    offset = 0.0

    def __init__(self, value: Any = 1.0) -> None:
        super().__init__()
        self.scale = value
        self.linear = nn.Linear(2, 2)


def guards_of(module: nn.Module, *names: str) -> GuardSet:
    return GuardSet([Source(module, name, f"self.{name}") for name in names], module.modules())


def test_settings_that_are_taken():
    """A setting that changes in each step costs little, and is no change of the next epoch."""
    module = nn.Sequential(nn.Dropout(0.1), nn.BatchNorm1d(2))
    guard = ModuleGuard(module)
    guard.check_epoch()
    assert guard.settings.hold()
    module[0].p = 0.2
    vars(module[1])["eps"] = 0.3
    assert not guard.settings.hold()
    assert guard.settings.changed() == [(id(module[0]), "p"), (id(module[1]), "eps")]
    guard.settings.take_held()
    assert guard.settings.hold()
    assert guard.settings.changed() == []
    assert guard.check_epoch() is None
    assert guard.settings.hold()
    del module[0].inplace
    assert not guard.settings.hold()
    guard.settings.take_held()
    assert guard.settings.hold()
    assert guard.check_epoch() is None
    assert guard.settings.hold()
    module[0].p = 0.4
    assert guard.check_epoch() is not None  # nobody has taken it


def test_settings_of_a_replaced_module():
    module = nn.Sequential(nn.Dropout(0.1))
    guard = ModuleGuard(module)
    guard.check_epoch()
    assert guard.settings.hold()
    module[0] = nn.Dropout(0.3)
    assert not guard.check()
    guard.refresh()
    vars(module[0])["p"] = 0.5
    assert not guard.settings.hold()


def set_value(kept: Any, value: Any) -> None:
    kept["a"][1].b = value


CHANGES: dict[str, tuple[Any, Any, str]] = {
    "a number": (1.0, lambda m: setattr(m, "scale", 2.0), "self.scale: now 2.0, before 1.0"),
    "another type": (1, lambda m: setattr(m, "scale", 1.0), "self.scale: now 1.0, before 1"),
    "gone": (1.0, lambda m: delattr(m, "scale"), "self.scale: now not there, before 1.0"),
    "deep": (
        {"a": [1, SimpleNamespace(b=2)]},
        lambda m: set_value(m.scale, 3),
        "self.scale['a'][1].b: now 3, before 2",
    ),
    "longer": ([1.0], lambda m: m.scale.append(2.0), "now 2 items, before 1"),
    "a leaf": ({"x": 1.0}, lambda m: m.scale.update(x=5.0), "self.scale['x']: now 5.0, before 1.0"),
    "deque": (collections.deque([1.0]), lambda m: m.scale.append(2.0), "self.scale"),
    "array": (np.zeros(2), lambda m: m.scale.__setitem__(0, 1), "the contents of the ndarray"),
    "moved tensor": (
        [torch.ones(2)],
        lambda m: setattr(m.scale[0], "data", torch.ones(2)),
        "self.scale[0]: the tensor has another address",
    ),
    "another tensor": (
        torch.ones(2),
        lambda m: setattr(m, "scale", torch.ones(2)),
        "self.scale: another object, tensor of shape (2,)",
    ),
    "hidden module": (
        [nn.Linear(1, 1)],
        lambda m: setattr(m.scale[0], "bias", nn.Parameter(torch.ones(1))),
        "parameters or buffers are at new addresses",
    ),
    "mode of a hidden module": ([nn.Dropout()], lambda m: m.scale[0].eval(), "training flag"),
    "attribute that hides that of the class": (
        1.0,
        lambda m: setattr(m, "offset", 0.5),
        "self.offset: now 0.5, before not there",
    ),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_change_is_seen_and_named_with_both_values(name):
    value, change, text = CHANGES[name]
    module = Scaled(value)
    guards = guards_of(module, "scale", "offset", "not_there")
    assert guards.check()
    change(module)
    assert not guards.check()
    assert text in guards.explain()


def test_the_class_of_a_module_is_guarded_too(monkeypatch):
    guards = guards_of(Scaled(), "offset")
    monkeypatch.setattr(Scaled, "offset", 3.0)
    assert not guards.check()
    assert guards.explain() == "Scaled.offset: now 3.0, before 0.0"


def test_globals(monkeypatch):
    guards = GuardSet([Source(globals(), "SCALE", "SCALE")])
    assert guards.check()
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert guards.explain() == "SCALE: now 2.0, before 1.0"


def test_equal_plain_values_hold_and_values_that_come_back_hold_again():
    module = Scaled(1000.5)
    guards = guards_of(module, "scale")
    module.scale = float("1000.5")
    assert guards.check()
    module.scale = 2.0
    assert not guards.check()
    module.scale = 1000.5
    assert guards.check()


def test_an_item_of_a_large_container():
    module = Scaled([0.0] * 1000)
    guards = guards_of(module, "scale")
    assert guards.check()
    module.scale[7] = 1.0
    assert not guards.check()
    assert guards.explain() == "self.scale[7]: now 1.0, before 0.0"


def test_reading_guards_runs_no_code_of_the_users():
    class Property(nn.Module):
        @property
        def value(self) -> Any:
            raise AssertionError("a guard must not ask")

        def __getattr__(self, name: str) -> Any:
            raise AssertionError("a guard must not ask")

    assert guards_of(Property(), "value", "other").check()


def test_sources_are_told_apart_by_holder_and_name():
    one, other = Scaled(), Scaled()
    assert Source(one, "scale", "self.a.scale").key == Source(one, "scale", "self.b.scale").key
    assert Source(one, "scale", "").key != Source(other, "scale", "").key
    assert Source(one, "nothing", "").value() is MISSING
    assert str(Source(one, "scale", "self.scale")) == "self.scale"


def test_a_repr_that_raises_does_not_end_the_run():
    class Silent:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    assert shorten(Silent()) == "<Silent: RuntimeError>"
    assert len(shorten("x" * 1000)) == 60


def rebind(module: nn.Module) -> None:
    module[0].weight.data = module[0].weight.data.clone()


def replace(module: nn.Module) -> None:
    module[0].weight = nn.Parameter(module[0].weight.data.clone())


MODULE_CHANGES: dict[str, tuple[Any, Change, str]] = {
    "rebound data": (rebind, Change.MOVED, "0.weight"),
    "replaced parameter": (replace, Change.MOVED, "Parameter of shape"),
    "another shape": (
        lambda m: setattr(m[0], "bias", nn.Parameter(torch.ones(3))),
        Change.STRUCTURE,
        "Parameter",
    ),
    "no bias": (lambda m: setattr(m[0], "bias", None), Change.STRUCTURE, "Parameter"),
    "replaced child": (lambda m: m.__setitem__(1, nn.Tanh()), Change.STRUCTURE, "ReLU"),
    "new child": (lambda m: m.append(nn.Tanh()), Change.STRUCTURE, ""),
    "new buffer": (lambda m: m.register_buffer("b", torch.ones(1)), Change.STRUCTURE, ""),
    "hook": (lambda m: m[1].register_forward_hook(lambda *_: None), Change.STRUCTURE, ""),
}


@pytest.mark.parametrize("name", list(MODULE_CHANGES))
def test_changes_of_a_module(name):
    change, kind, subject = MODULE_CHANGES[name]
    module = Body()
    guard = ModuleGuard(module)
    assert guard.check()
    change(module)
    assert not guard.check()
    failure = guard.failure()
    assert failure.change is kind
    assert failure.text.startswith(kind.value)
    assert subject in failure.text
    guard.refresh()
    assert guard.check()


def test_changes_in_place_are_none():
    module = Body()
    guard = ModuleGuard(module)
    with torch.no_grad():
        module[0].weight.mul_(2)
    module.load_state_dict(Body().state_dict())
    module.train(False)
    assert guard.check()
    assert guard.check_epoch() is None


def test_settings_are_compared_once_an_epoch():
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    settings = WrittenSettings()
    settings.add(module.named_children())
    guard = ModuleGuard(module, written=settings)
    strict = ModuleGuard(module)
    assert guard.check_epoch() is strict.check_epoch() is None
    module[1].seen = module[0].training = True
    del module[1].seen
    assert guard.check()
    assert strict.check()
    assert not settings.written
    vars(module[1])["p"] = 0.25
    assert guard.check()
    written = {key: each.before for key, each in settings.written.items()}
    assert written == {(id(module[1]), "p"): 0.5}
    assert not strict.check()
    assert strict.failure().text.endswith("self.1.p: now 0.25, before 0.5")
    failure = guard.check_epoch()
    assert failure.change is Change.SETTINGS
    assert failure.text.endswith("self.1.p: now 0.25, before 0.5")
    assert guard.check_epoch() is None


@pytest.mark.parametrize(
    "change",
    [
        lambda module: setattr(module[0].weight, "data", module[0].weight.data.t()),
        lambda module: module[0].weight.t_(),
        lambda module: setattr(module[0].bias, "data", module[0].bias.data[:1].expand(2)),
        lambda module: setattr(module[0].weight, "data", module[0].weight.data[:1]),
        lambda module: setattr(module[0].table, "data", module[0].table.view(torch.int32)),
        lambda module: setattr(module[0].bias, "data", torch._neg_view(module[0].bias.data)),
    ],
)
@pytest.mark.parametrize("native", [True, False])
def test_layouts_are_compared(monkeypatch, change, native):
    if not native:
        monkeypatch.setattr(module_guard, "_NativeLayouts", None)
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].register_buffer("table", torch.ones(2))
    module[1].weight = module[0].weight  # tied
    with torch.no_grad():
        guard = ModuleGuard(module)
        assert guard.check()
        with torch.inference_mode():
            assert guard.check()
            assert guard.check()
        flags = guard.flags()
        module[0].weight.requires_grad_(False)
        assert guard.check()
        assert guard.flags() != flags  # another key
        addresses = [each.data_ptr() for each in guard.tensors]
        change(module)
        assert [each.data_ptr() for each in guard.tensors] == addresses
        assert not guard.check()
    assert guard.failure().change is Change.LAYOUT


@pytest.mark.filterwarnings("ignore:Sparse CS")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_parts_of_sparse_buffers_are_compared(layout):
    module = nn.Linear(2, 2)
    module.register_buffer("adjacency", torch.eye(2).to_sparse(layout=layout))
    guard = ModuleGuard(module)
    other = (torch.eye(2) * 2).to_sparse(layout=layout)
    assert guard.check()
    (module.adjacency._values if layout is torch.sparse_coo else module.adjacency.values)().mul_(2)
    assert guard.check()
    if layout is torch.sparse_coo:  # PyTorch ignores it for the others
        module.adjacency.data = other
    else:
        module.adjacency = other
    assert not guard.check()
    assert guard.failure().change in (Change.STRUCTURE, Change.MOVED)


def test_explanations_of_values_that_hold_are_empty():
    assert FrozenValues([[1, 2], {"a": torch.ones(1)}], ["x", "y"]).explain() == ""


class Mixed:
    """An object that is more than a configuration."""

    def __init__(self) -> None:
        self.function = torch.relu
        self.factors = [1.0]
        self.array = np.zeros(2)
        self.net = nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda mixed: mixed.factors.append(2.0), "self.scale.factors: other keys"),
        (lambda mixed: mixed.array.__setitem__(0, 1.0), "self.scale.array: the contents"),
        (lambda mixed: setattr(mixed.net.bias, "data", torch.ones(1)), "at new addresses"),
    ],
)
def test_what_is_inside_an_object_that_holds_a_function_too(change, text):
    module = Scaled(Mixed())
    guards = guards_of(module, "scale")
    assert guards.check()
    change(module.scale)
    assert not guards.check()
    assert text in guards.explain()


class Pair:
    def __init__(self, a: Any, b: Any) -> None:
        self.a, self.b, self.function = a, b, torch.relu


def test_what_one_object_leads_to_is_still_compared_if_it_is_read_itself():
    mixed, inner = Mixed(), Mixed()
    mixed.factors.append(inner)
    large = [inner] * 300
    for value in (
        [mixed, inner],
        [inner, mixed],
        Pair(inner, large),
        Pair(large, inner),
    ):
        module = Scaled(value)
        guards = guards_of(module, "scale")
        inner.array += 1
        assert not guards.check()


def test_a_tensor_that_is_transposed_in_place():
    module = Scaled(torch.ones(2, 2))
    guards = guards_of(module, "scale")
    module.scale.t_()
    assert not guards.check()
    assert guards.explain() == (
        "self.scale: the tensor has another shape, other strides, data type or requires_grad"
    )


def test_minus_zero_is_another_value():
    module = Scaled(0.0)
    guards = guards_of(module, "scale")
    module.scale = -0.0
    assert not guards.check()
    assert guards.explain() == "self.scale: now -0.0, before 0.0"


def test_settings_of_hidden_modules_are_compared_once_an_epoch():
    module = Scaled([nn.LayerNorm(2)])
    guards = guards_of(module, "scale")
    assert guards.check_epoch()
    module.scale[0].eps = 1.0
    assert not guards.check_epoch()
    assert "eps: now 1.0" in guards.explain()


@pytest.mark.parametrize(
    ("make", "change", "text"),
    [
        (SimpleNamespace, lambda item: setattr(item, "b", 3), "self.scale[7].b: now 3"),
        (lambda: np.zeros(1), lambda item: item.__setitem__(0, 1), "self.scale[7]: the contents"),
        (lambda: torch.ones(1), lambda item: setattr(item, "data", torch.ones(1)), "another addr"),
    ],
)
def test_what_is_inside_a_large_container(make, change, text):
    module = Scaled([make() for _ in range(300)])
    guards = guards_of(module, "scale")
    assert guards.check()
    change(module.scale[7])
    assert not guards.check()
    assert text in guards.explain()


def test_flags_are_those_of_a_watched_call():
    """The key of a watched call is that of a call later on, also with scripted modules inside."""
    scripted = torch.jit.script(nn.Linear(2, 2))
    module = nn.Sequential(scripted, nn.Dropout(), nn.BatchNorm1d(2))
    module[1].eval()
    module[2].weight.requires_grad_(False)
    assert module_guard.Flags(list(module.modules())).now() == ModuleGuard(module).flags()
    assert bytes([1, 1, 0, 1, 0, 0, 0]) in ModuleGuard(module).flags()


@pytest.mark.parametrize("native", [True, False])
def test_flags_after_a_check_are_those_of_now(monkeypatch, native):
    """They are kept as long as a check finds no change; each of these changes is one."""
    if not native:
        monkeypatch.setattr(module_guard, "_NativeLayouts", None)
        monkeypatch.setattr(module_guard, "version_of", always_new)
    module = LightningModule()
    module.net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module.metric = SumMetric()
    guard = ModuleGuard(module)
    changes: list[Callable[[], object]] = [
        lambda: None,
        module.eval,
        module.net[1].train,
        lambda: setattr(module, "training", True),
        lambda: setattr(module.metric, "training", True),
        lambda: module.net[0].weight.requires_grad_(False),
        lambda: module.net[0].weight.requires_grad_(True),
        lambda: module.net[1].running_mean.requires_grad_(True),
    ]
    seen = []
    with torch.inference_mode():
        for change in changes:
            change()
            for _ in range(3):
                assert guard.check()
                assert guard.flags_after_check() == guard.flags()
            seen.append(guard.flags_after_check())
    assert len(set(seen)) == len(changes) - 1  # the weight has its gradient again


IN_MODULES: dict[str, Callable[[nn.Sequential], object]] = {
    "a submodule": lambda net: net._modules.update({"0": nn.Linear(2, 2)}),
    "a table": lambda net: vars(net).update({"_modules": dict(net._modules)}),
    "a parameter": lambda net: net[0]._parameters.update(
        {"weight": nn.Parameter(torch.ones(2, 2))}
    ),
    "a hook": lambda net: net[0].register_forward_hook(lambda *_: None),
    "an order": lambda net: net._modules.update({"0": net._modules.pop("0")}),
    "a setting": lambda net: vars(net[1]).update({"inplace": True}),
}


@pytest.mark.parametrize("has_versions", [True, False])
@pytest.mark.parametrize("name", IN_MODULES)
def test_changes_are_seen_without_versions_of_dictionaries(monkeypatch, name, has_versions):
    """PyTorch's function for them is private. Without it, contents are compared each time."""
    assert library_code.version_of is not library_code.always_new, "the private function is gone"
    if not has_versions:
        for module in (library_code, module_guard):
            monkeypatch.setattr(module, "version_of", library_code.always_new)
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    guard = ModuleGuard(net, has_code=True)
    guard.check_epoch()
    assert guard.check()
    assert guard.check()
    IN_MODULES[name](net)
    assert not guard.check()


def test_replaced_functions_are_seen_without_versions_of_dictionaries(monkeypatch):
    for module in (library_code, module_guard):
        monkeypatch.setattr(module, "version_of", library_code.always_new)
    guard = ModuleGuard(nn.Linear(2, 2), has_code=True)
    assert guard.check()
    monkeypatch.setattr(torch, "relu", lambda x: x)
    assert not guard.check()
