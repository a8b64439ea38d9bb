"""Interception of one module object: the handler sees the events, and nothing else changes."""

import copy
import functools
import gc
import inspect
import io
import itertools
import pickle
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from cg_lightning.modules import interception as patches
from cg_lightning.modules.interception import (
    Interception,
    ModuleHandler,
    base_method,
    can_intercept,
    replaced_method,
    suspended,
)
from tests.conftest import classes_with_a_trace, modules_with_a_trace
from tests.models import Body, Predictor

X = torch.ones(1, 2)


class Counts(ModuleHandler):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_call(self, original, args, kwargs):
        self.calls.append(args)
        return original(*args, **kwargs)


def counted(module):
    handler = Counts()
    return Interception(module, handler), handler.calls


class Everything(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.writes: list[tuple[str, Any]] = []
        self.copies = 0

    def on_read(self, name):
        self.reads.append(name)

    def on_write(self, name, value):
        self.writes.append((name, value))

    def get_missing(self, name):
        if name == "far_away":
            return 7
        raise AttributeError(name)

    def before_copy(self):
        self.copies += 1


def test_intercepts_one_object_and_leaves_no_trace():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    attributes = dict(vars(net[0]))
    interception, calls = counted(net[0])
    net(X)
    assert len(calls) == 1
    assert type(net[0]) is net[0].__class__ is nn.Linear
    assert vars(net[0]) == attributes
    assert list(net.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    interception.remove()
    interception.remove()
    net(X)
    assert len(calls) == 1


def test_everything_that_a_handler_can_see():
    net, handler = nn.Linear(2, 2), Everything()
    interception = Interception(net, handler)
    net.weight, net.in_features  # noqa: B018
    assert net.far_away == 7
    with pytest.raises(AttributeError, match=r"'Linear' object has no attribute 'nowhere'"):
        net.nowhere  # noqa: B018
    assert {"in_features", "far_away", "nowhere"} <= set(handler.reads)
    assert "weight" not in handler.reads
    net.scale = 2
    assert handler.writes == [("scale", 2)]
    interception.remove()
    assert not hasattr(net, "far_away")
    assert net.scale == 2


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


class ReducesItself(nn.Linear):
    def __reduce__(self):
        return (load, (self.state_dict(),))


def load(state: Any) -> ReducesItself:
    new = ReducesItself(2, 2)
    new.load_state_dict(state)
    return new


MAKE = [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), save_and_load]


@pytest.mark.parametrize("kind", [nn.Linear, CopiesItself, ReducesItself])
@pytest.mark.parametrize("make", MAKE)
def test_copies_are_plain(make, kind):
    net = kind(2, 2)
    outer, calls = counted(net)
    inner = Interception(net, everything := Everything())
    other = make(net)
    assert type(other) is kind
    assert everything.copies > 0
    assert torch.equal(other.weight, net.weight)
    other(X)
    assert calls == []
    net(X)
    assert len(calls) == 1
    inner.remove()
    outer.remove()


def test_a_pickle_is_the_same():
    net = nn.Linear(2, 2)
    before = pickle.dumps(net)
    interception = Interception(net, Everything())
    assert pickle.dumps(net) == before
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


class Forwards:
    def forward(self, x):
        return x * 2


class Registers(type(nn.Module)):
    known: list[str] = []  # noqa: RUF012

    def __new__(mcs, name, bases, namespace):
        mcs.known.append(name)
        return super().__new__(mcs, name, bases, namespace)


class Strict(type(nn.Module)):
    def __setattr__(cls, name, value):
        raise TypeError("this class is final")

    def __delattr__(cls, name):
        raise TypeError("this class is final")


class Interface(ABC):
    @abstractmethod
    def forward(self, x): ...


T = TypeVar("T")


class AbstractFirst(ABC, Forwards, nn.Module):
    pass


class InterfaceFirst(Interface, nn.Module):
    def forward(self, x):
        return x * 2


class GenericFirst(Generic[T], Forwards, nn.Module):
    pass


class WithSlots(Forwards, nn.Module):
    __slots__ = ("note",)


class Registered(Forwards, nn.Module, metaclass=Registers):
    pass


class Final(Forwards, nn.Module, metaclass=Strict):
    def __call__(self, x, *, more=0):
        return super().__call__(x) + more

    def __setattr__(self, name, value):
        super().__setattr__(name, value)

    def __getattr__(self, name):
        return super().__getattr__(name)


class HasEverything(Forwards, nn.Module):
    """Overrides special methods. Each one calls that of its base class."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)

    def __getattribute__(self, name):
        return super().__getattribute__(name)

    def __setattr__(self, name, value):
        super().__setattr__(name, value)

    def __getattr__(self, name):
        return super().__getattr__(name)

    def __getstate__(self):
        return super().__getstate__()


class PartialCall(Forwards, nn.Module):
    def _run(self, x, factor):
        return self.forward(x) * factor

    __call__ = functools.partialmethod(_run, factor=1)


KINDS = [
    *(AbstractFirst, InterfaceFirst, GenericFirst, WithSlots),
    *(Registered, Final, HasEverything, PartialCall),
]


@pytest.mark.parametrize("kind", KINDS)
def test_classes_of_all_kinds(kind):
    known, attributes = list(Registers.known), dict(vars(kind))
    net, other, handler = kind(), kind(), Everything()
    neighbour = Interception(nn.Identity(), Everything())  # also patches nn.Module
    signature = inspect.signature(net)
    interception = Interception(net, handler)
    if kind is not PartialCall:
        assert inspect.signature(net) == signature
    assert type(net) is net.__class__ is kind
    assert isinstance(net, nn.Module)
    assert net(3) == other(3) == 6
    net.note = 1
    other.note = 2
    assert (net.note, net.far_away) == (1, 7)
    assert not hasattr(other, "far_away")
    assert type(copy.deepcopy(net)) is kind
    assert handler.calls == [(3,)]
    assert handler.writes == [("note", 1)]
    assert handler.reads.count("note") == 1
    assert handler.copies > 0
    assert Registers.known == known
    neighbour.remove()
    interception.remove()
    assert dict(vars(kind)) == attributes
    assert net(3) == 6


def test_a_module_whose_class_changes_meanwhile():
    net = nn.Linear(2, 2)
    interception, calls = counted(net)
    parametrize.register_parametrization(net, "weight", nn.Identity())
    assert type(net).__mro__[1] is nn.Linear
    net(X)
    assert len(calls) == 1
    parametrize.remove_parametrizations(net, "weight")
    assert type(net) is nn.Linear
    net(X)
    assert len(calls) == 2
    interception.remove()
    net(X)
    assert len(calls) == 2


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


@pytest.mark.parametrize("kind", [lambda: nn.Linear(2, 2), Final, HasEverything])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_removed_in_any_order(order, kind):
    net = kind()
    made = [counted(net) for _ in range(3)]
    for number, index in enumerate(order):
        made[index][0].remove()
        net(X)
        still = {other for other in range(3) if other not in order[: number + 1]}
        assert {other for other in range(3) if len(made[other][1]) == number + 1} == still


def test_the_latest_is_the_outermost():
    order: list[str] = []

    class Named(ModuleHandler):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_call(self, original, args, kwargs):
            order.append(f"{self.name} begins")
            output = original(*args, **kwargs) + 1
            order.append(f"{self.name} ends")
            return output

    net = nn.Identity()
    made = [Interception(net, Named(name)) for name in ("first", "second")]
    assert net(0) == 2
    assert order == ["second begins", "first begins", "first ends", "second ends"]
    for interception in made:
        interception.remove()


def test_removed_while_it_runs():
    class RemovesItself(ModuleHandler):
        def on_call(self, original, args, kwargs):
            interception.remove()
            return original(*args, **kwargs)

    net = nn.Identity()
    interception = Interception(net, RemovesItself())
    assert net(1) == 1


class BoomError(Exception):
    pass


class Fails(ModuleHandler):
    def on_call(self, original, args, kwargs):
        raise BoomError

    def on_read(self, name):
        if name == "in_features":
            raise BoomError

    def on_write(self, name, value):
        raise BoomError

    def get_missing(self, name):
        raise BoomError

    def before_copy(self):
        raise BoomError


@pytest.mark.parametrize(
    "use",
    [
        lambda net: net(X),
        lambda net: net.in_features,
        lambda net: setattr(net, "scale", 1),
        lambda net: net.nowhere,
        copy.deepcopy,
    ],
)
def test_exceptions_of_handlers_come_through(use):
    net = nn.Linear(2, 2)
    interception = Interception(net, Fails())
    with pytest.raises(BoomError):
        use(net)
    interception.remove()
    assert classes_with_a_trace() == []


def test_other_threads_meet_no_handler():
    net, handler, seen = nn.Linear(2, 2), Everything(), []

    def use() -> None:
        net(X)
        net.scale = net.in_features
        seen.append(net.far_away)  # every thread must find the state

    interception = Interception(net, handler)
    thread = threading.Thread(target=use)
    handler.reads.clear()
    thread.start()
    thread.join()
    assert (handler.calls, handler.writes, handler.reads, seen) == ([], [], [], [7])
    interception.remove()


def test_two_threads_see_their_own_calls():
    net = nn.Identity()
    mine, my_calls = counted(net)
    theirs: list[Any] = []

    def use() -> None:
        interception, calls = counted(net)
        net("theirs")
        theirs.extend(calls)
        interception.remove()

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    net("mine")
    mine.remove()
    assert (my_calls, theirs) == ([("mine",)], [("theirs",)])


def test_only_what_a_handler_overrides_is_patched():
    interception, _ = counted(nn.Linear(2, 2))
    assert {name.split(".")[1] for name in classes_with_a_trace()} == {"__call__"}
    interception.remove()
    metric = MulticlassAccuracy(3)

    class GetsMissing(ModuleHandler):
        def get_missing(self, name):
            raise AttributeError(name)

    interception = Interception(metric, GetsMissing())
    assert vars(nn.Module)["__getattr__"].__module__ == "torch.nn.modules.module"
    interception.remove()


def test_modules_that_are_not_intercepted_enter_one_function_of_ours():
    other, entered = nn.Identity(), []
    interception, _ = counted(nn.Linear(2, 2))

    def on_event(frame, event, _):
        if event == "call" and "cg_lightning" in frame.f_code.co_filename:
            entered.append(frame.f_code.co_name)

    sys.setprofile(on_event)
    try:
        other(X)
    finally:
        sys.setprofile(None)
        interception.remove()
    assert entered == ["__call__"]


def test_metrics():
    metric, handler = MulticlassAccuracy(3), Everything()
    interception = Interception(metric, handler)
    metric.update(torch.tensor([1, 2]), torch.tensor([1, 1]))
    assert {"_update_count", "tp"} <= {name for name, _ in handler.writes}
    with pytest.raises(RuntimeError, match="Can't change const"):
        metric.higher_is_better = False
    assert isinstance(metric, Metric)
    assert metric.compute() == MulticlassAccuracy(3)(torch.tensor([1, 2]), torch.tensor([1, 1]))
    interception.remove()


def test_somebody_else_patches_at_the_same_time(monkeypatch):
    seen = []
    before = nn.Module.__call__

    def traced(self, *args, **kwargs):
        seen.append(1)
        return inner(self, *args, **kwargs)

    net = nn.Identity()
    interception, calls = counted(net)
    with monkeypatch.context() as patched:  # inside ours
        inner = nn.Module.__call__
        patched.setattr(nn.Module, "__call__", traced)
        net(1)
        late, late_calls = counted(net)
        net(1)
        late.remove()
    interception.remove()
    assert (len(seen), len(calls), len(late_calls)) == (2, 2, 1)
    assert nn.Module.__call__ is before
    with monkeypatch.context() as patched:  # outside ours
        inner = before
        patched.setattr(nn.Module, "__call__", traced)
        interception, calls = counted(net)
        net(1)
        interception.remove()
    assert (len(seen), len(calls)) == (3, 1)


def test_scripted_modules_are_not_intercepted():
    assert can_intercept(nn.Linear(2, 2))
    assert not can_intercept(torch.jit.script(nn.Linear(2, 2)))


def test_nothing_is_kept_alive():
    class Mine(nn.Module):
        pass

    net = Mine()
    Interception(net, Everything()).remove()
    found = weakref.ref(net)
    gc.disable()
    try:
        del net
        assert found() is None
    finally:
        gc.enable()


# --- methods ---


class Logs(Predictor):
    def log(self, name, value, **kwargs):
        super().log(f"mine/{name}", value, **kwargs)


def test_a_method_is_replaced_below_the_users_override():
    calls: list[Any] = []
    net, other = Logs(Body()), Predictor(Body())

    def replacement(original, *args, **kwargs):
        calls.append((original, args, kwargs))

    with replaced_method(net, "log", replacement), replaced_method(other, "log", replacement):
        net.log("loss", 1)
        net.log_dict({"a": 2})
    assert [args for _, args, _ in calls] == [("mine/loss", 1), ("mine/a", 2)]
    assert base_method(net, "log").__func__ is vars(Predictor.__mro__[1])["log"]
    assert calls[0][2] == {}


def test_replacements_nest_and_go_on_to_the_original():
    order = []

    class Greets(nn.Module):
        def greet(self, name, *, self_=""):
            order.append("original")
            return f"hello {name}{self_}"

    def add(mark):
        def replacement(original, *args, **kwargs):
            order.append(mark)
            return original(*args, **kwargs) + mark

        return replacement

    net, other = Greets(), Greets()
    with replaced_method(net, "greet", add("!")), replaced_method(net, "greet", add("?")):
        assert net.greet("you", self_="x") == "hello youx!?"
        assert other.greet(name="you") == "hello you"
    assert order == ["?", "!", "original", "original"]
    with pytest.raises(BoomError), replaced_method(net, "greet", add("!")):
        raise BoomError
    assert net.greet("you") == "hello you"


def test_a_mixin_behind_the_module_is_not_where_calls_arrive():
    class Logger:
        def log(self, *args):
            raise AssertionError("never reached")

    class Mixed(Predictor, Logger):
        pass

    calls = []
    net = Mixed(Body())
    with replaced_method(net, "log", lambda original, *args: calls.append(args)):
        net.log("loss", 1)
    assert calls == [("loss", 1)]


# --- compiled code ---


class Compiles:
    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        assert classes_with_a_trace() == []
        return graph


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(2, 2), 2.0

    def forward(self, x):
        return self.first(x).relu() * self.scale


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_modules_run_and_are_compiled_without_us(in_place):
    torch.compiler.reset()
    backend, net = Compiles(), Layers()
    run: Any = net
    if in_place:
        net.compile(backend=backend)
    else:
        run = torch.compile(net, backend=backend)
    for stage in range(6):
        handler = Everything()
        interceptions = [Interception(module, handler) for module in (run, net.first)]
        run(X)
        assert len(handler.calls) == 1
        for interception in interceptions:
            interception.remove()
        if stage == 2:
            run(X)
    assert backend.graphs == 1


def test_a_compiled_function_meets_no_handler():
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    net = nn.Linear(2, 2)
    function = torch.compile(lambda x: net(x).sin(), backend=backend, fullgraph=True)
    for _ in range(6):
        interception, calls = counted(net)
        other, _ = counted(nn.Linear(2, 2))
        function(X)
        assert calls == []
        interception.remove()
        other.remove()
        function(X)
    assert len(graphs) <= 2


@torch.no_grad()
def test_a_compiled_function_with_graph_breaks():
    torch.compiler.reset()
    net = Layers()

    def function(x):
        for _ in range(2):
            x = net(x)
            torch._dynamo.graph_break()
            x = x * net.scale + net.first.in_features
        return x

    expected, compiled = function(X), torch.compile(function, backend="eager")
    for _ in range(3):
        handler = Everything()
        interception = Interception(net, handler)
        assert torch.equal(compiled(X), expected)
        assert handler.calls == []
        assert net.far_away == 7
        interception.remove()
        assert torch.equal(compiled(X), expected)


def test_suspended_takes_all_off():
    net, handler = nn.Linear(2, 2), Everything()
    interception = Interception(net, handler)
    with suspended():
        assert classes_with_a_trace() == []
        with suspended():
            net(X)
        assert classes_with_a_trace() == []
        late, late_calls = counted(net)
        net(X)
    assert handler.calls == late_calls == []
    net(X)
    assert (len(handler.calls), len(late_calls)) == (1, 1)
    late.remove()
    interception.remove()
    with pytest.raises(BoomError), suspended():
        raise BoomError
    assert patches._suspensions == 0


def test_the_check_for_traces_can_fail():
    net = nn.Linear(2, 2)
    interception, _ = counted(net)
    assert modules_with_a_trace() == ["Linear"]
    assert "Module.__call__" in classes_with_a_trace()
    interception.remove()
    assert modules_with_a_trace() == classes_with_a_trace() == []
