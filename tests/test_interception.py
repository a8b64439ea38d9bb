import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from cg_lightning.modules.interception import Interception
from tests.conftest import classes_with_a_trace, modules_with_a_trace


def counted(module):
    calls = []

    def call(*args, **kwargs):
        calls.append(args)
        return interception.call_original(*args, **kwargs)

    interception = Interception(module, call=call)
    return interception, calls


def test_intercepts_one_object_and_leaves_no_trace():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    attributes = dict(vars(net[0]))
    interception, calls = counted(net[0])
    net(torch.ones(1, 2))
    assert len(calls) == 1
    assert isinstance(net[0], nn.Linear)
    assert net[0].__class__ is nn.Linear
    assert vars(net[0]) == attributes
    assert list(net.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    interception.remove()
    interception.remove()
    assert type(net[0]) is nn.Linear


def save_and_load(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class CopiesItself(nn.Linear):
    def __deepcopy__(self, memo):
        new = type(self)(self.in_features, self.out_features)
        new.load_state_dict(self.state_dict())
        return new


@pytest.mark.parametrize("kind", [nn.Linear, CopiesItself])
@pytest.mark.parametrize(
    "make", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), save_and_load]
)
def test_copies_are_plain(make, kind):
    net = kind(2, 2)
    outer, calls = counted(net)
    inner, _ = counted(net)
    other = make(net)
    assert type(other) is kind
    assert torch.equal(other.weight, net.weight)
    other(torch.ones(1, 2))
    assert calls == []
    net(torch.ones(1, 2))
    assert len(calls) == 1
    inner.remove()
    outer.remove()


def test_a_pickle_does_not_need_this_package():
    net = nn.Linear(2, 2)
    interception, _ = counted(net)
    assert b"cg_lightning" not in pickle.dumps(net)
    interception.remove()


def test_users_subclass_hook_and_metaclass_are_not_run():
    registry = []

    class Base(nn.Module):
        def __init_subclass__(cls, *, name, **kwargs):
            registry.append(name)

    class Mine(Base, name="mine"):
        def forward(self, x):
            return x

    net = Mine()
    interception, calls = counted(net)
    assert net(1) == 1
    assert (registry, calls) == (["mine"], [(1,)])
    interception.remove()


def test_a_class_that_somebody_puts_in_its_place_stays():
    net = nn.Linear(2, 2)
    interception, calls = counted(net)
    parametrize.register_parametrization(net, "weight", nn.Identity())
    interception.remove()
    assert type(net).__mro__[1] is nn.Linear
    net(torch.ones(1, 2))
    assert calls == []


def test_a_method_wins_over_an_attribute_of_the_instance():
    net = nn.Linear(2, 2)
    net.extra_repr = lambda: "of the instance"
    interception = Interception(net, methods={"extra_repr": lambda: "ours"})
    assert net.extra_repr() == "ours"
    with pytest.raises(
        AttributeError, match="extra_repr cannot be replaced while CUDAGraphCallback"
    ):
        net.extra_repr = None
    interception.remove()
    assert net.extra_repr() == "of the instance"


def test_what_is_assigned_to_its_type_lands_on_the_users_class():
    class Mine(nn.Module):
        count = 0

        def forward(self):
            type(self).count += 1
            self.__class__.count += 1
            return type(self).count

    net = Mine()
    outer, _ = counted(net)
    inner, _ = counted(net)
    assert net() == 2
    inner.remove()
    outer.remove()
    assert (Mine.count, net.count) == (2, 2)


@pytest.mark.parametrize(
    "order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
)
def test_removed_in_any_order(order):
    net = nn.Linear(2, 2)
    made = [counted(net) for _ in range(3)]
    for number, index in enumerate(order):
        made[index][0].remove()
        net(torch.ones(1, 2))
        still = {other for other in range(3) if other not in order[: number + 1]}
        assert {other for other in range(3) if len(made[other][1]) == number + 1} == still
    assert type(net) is nn.Linear


def test_it_is_the_same_class_again_after_a_pause():
    net = nn.Linear(2, 2)
    interception, calls = counted(net)
    ours = type(net)
    interception.suspend()
    assert type(net) is nn.Linear
    assert interception.resume()
    assert type(net) is ours
    net(torch.ones(1, 2))
    assert len(calls) == 1
    interception.suspend()
    parametrize.register_parametrization(net, "weight", nn.Identity())
    assert not interception.resume()
    interception.remove()


def test_the_check_for_traces_can_fail():
    net = nn.Linear(2, 2)
    interception, _ = counted(net)
    assert modules_with_a_trace() == ["Linear"]
    assert len(classes_with_a_trace()) == 1
    interception.remove()
    assert modules_with_a_trace() == []
