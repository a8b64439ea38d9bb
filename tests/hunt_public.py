"""Steps as in public code: state in objects, descriptors, contexts, swaps of weights.

They are rows of the hunt as those of hunt_cases.py, and have the same owners.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import enum
import functools
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

# ------------------------------------------------------------------------------ state in objects


@dataclasses.dataclass
class State:
    steps: int = 0
    total: Any = 0.0
    seen: list[Any] = dataclasses.field(default_factory=list)

    @property
    def is_even(self) -> bool:
        return self.steps % 2 == 0

    def advance(self) -> None:
        self.steps += 1


class Phase(enum.Enum):
    WARM = 1
    HOT = 2

    def following(self) -> Phase:
        return Phase.HOT if self is Phase.WARM else Phase.WARM


class Counted:
    """A descriptor that counts how often it is read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.reads = 0

    def __get__(self, instance: Any, owner: type) -> Any:
        self.reads += 1
        return self.reads


class Stored:
    """A descriptor that keeps the values of all instances."""

    def __init__(self) -> None:
        self.values = weakref.WeakKeyDictionary()

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else self.values.get(instance, 1.0)

    def __set__(self, instance: Any, value: Any) -> None:
        self.values[instance] = value


class Described:
    counted = Counted()
    stored = Stored()


class Holder:
    def __init__(self) -> None:
        self.n = 0

    @functools.cached_property
    def scale(self) -> float:
        self.n += 1
        return 2.0 + self.n

    def __getattr__(self, name: str) -> Any:
        if name.startswith("virtual_"):
            self.__dict__["n"] += 1
            return self.n
        raise AttributeError(name)

    def __len__(self) -> int:
        self.n += 1
        return self.n

    def __bool__(self) -> bool:
        self.n += 1
        return self.n % 2 == 0

    def __eq__(self, other: object) -> bool:
        self.n += 1
        return self.n % 2 == 0

    __hash__ = object.__hash__

    def __iter__(self) -> Iterator[int]:
        self.n += 1
        yield from range(self.n)

    def __contains__(self, item: object) -> bool:
        self.n += 1
        return self.n % 2 == 0

    def __getitem__(self, index: int) -> int:
        self.n += index
        return self.n

    def __call__(self, x: Tensor) -> Tensor:
        self.n += 1
        return x * self.n

    def __enter__(self) -> int:
        self.n += 1
        return self.n

    def __exit__(self, *_: Any) -> None:
        self.n += 10

    def __matmul__(self, x: Tensor) -> Tensor:
        self.n += 1
        return x * self.n


def have_a_state(self):
    self.state = State()


def advances_a_dataclass(self, x):
    self.state.advance()
    return x * 2 if self.state.is_even else x


def advances_by_replace(self, x):
    self.state = dataclasses.replace(self.state, steps=self.state.steps + 1)
    return x * self.state.steps


def totals_a_tensor_in_a_dataclass(self, x):
    self.state.total = self.state.total + x.mean()
    return x + self.state.total


def totals_a_tensor_only(self, x):
    self.state.total += x.sum()
    return x


def keeps_seen_in_a_dataclass(self, x):
    self.state.seen.append(x)
    return sum(self.state.seen)


def have_a_phase(self):
    self.phase = Phase.WARM


def goes_to_the_next_phase(self, x):
    self.phase = self.phase.following()
    return x * self.phase.value


def matches_a_phase(self, x):
    match self.phase:
        case Phase.WARM:
            self.phase = Phase.HOT
            return x
        case Phase.HOT:
            return x * 3


def have_a_holder(self):
    self.holder, self.described = Holder(), Described()


def reads_a_counted_descriptor(self, x):
    return x * self.described.counted


def sets_a_stored_descriptor(self, x):
    self.described.stored = self.described.stored + 1
    return x * self.described.stored


def reads_a_cached_property(self, x):
    return x * self.holder.scale


def clears_a_cached_property(self, x):
    y = x * self.holder.scale
    del self.holder.scale
    return y


def reads_a_virtual_attribute(self, x):
    return x * self.holder.virtual_a


def asks_for_its_length(self, x):
    return x * len(self.holder)


def asks_for_its_truth(self, x):
    return x * 2 if self.holder else x


def compares_it(self, x):
    return x * 2 if self.holder == 3 else x


def iterates_over_it(self, x):
    return x * (1 + sum(self.holder))


def asks_whether_it_contains(self, x):
    return x * 2 if 3 in self.holder else x


def subscripts_it(self, x):
    return x * self.holder[1]


def calls_it(self, x):
    return self.holder(x)


def enters_it(self, x):
    with self.holder as number:
        return x * number


def multiplies_by_it(self, x):
    return self.holder @ x


def have_a_counted_class(self):
    class Counts(type(self)):
        counted = Counted()

    Counts.counted  # noqa: B018
    self.__class__ = Counts


def reads_a_counted_class(self, x):
    return x * self.counted


class CountedCall:
    """A decorator with state."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.function(x) * self.calls


@CountedCall
def counted(x):
    return x + 1


def have_a_counted_method(self):
    class Counts(type(self)):
        helper = CountedCall(lambda x: x * 2)

    self.__class__ = Counts


def calls_a_counted_function(self, x):
    return counted(x)


def calls_a_counted_method(self, x):
    return self.helper(x)


OBJECTS = [
    (have_a_counted_class, reads_a_counted_class),
    (have_a_counted_method, calls_a_counted_method),
    calls_a_counted_function,
    *((have_a_state, work) for work in (advances_a_dataclass, advances_by_replace,
                                        totals_a_tensor_in_a_dataclass, totals_a_tensor_only,
                                        keeps_seen_in_a_dataclass)),
    *((have_a_phase, work) for work in (goes_to_the_next_phase, matches_a_phase)),
    *((have_a_holder, work) for work in (
        reads_a_counted_descriptor, sets_a_stored_descriptor, reads_a_cached_property,
        clears_a_cached_property, reads_a_virtual_attribute, asks_for_its_length,
        asks_for_its_truth, compares_it, iterates_over_it, asks_whether_it_contains,
        subscripts_it, calls_it, enters_it,
        multiplies_by_it)),
]  # fmt: skip


# ------------------------------------------------------------------------------- ways of control

TOTAL = 0
CALLS: collections.Counter[str] = collections.Counter()
DEPTH = [0]


def have_none(self):
    self.last = None


def counts_in_a_global(self, x):
    global TOTAL
    TOTAL += 1
    return x * TOTAL


def counts_in_a_global_counter(self, x):
    CALLS["step"] += 1
    return x


def counts_in_finally(self, x):
    try:
        return x * (1 + DEPTH[0])
    finally:
        DEPTH[0] += 1


def recurse(x, depth):
    DEPTH[0] += 1
    return x if depth == 0 else recurse(x * 1.5, depth - 1)


def recurses(self, x):
    return recurse(x, 3) + DEPTH[0]


@contextlib.contextmanager
def scaled(owner, by):
    before = getattr(owner, "factor", 1.0)
    owner.factor = by
    try:
        yield by
    finally:
        owner.factor = before


def have_a_factor(self):
    self.factor = 1.0


def works_in_a_context_of_its_own(self, x):
    with scaled(self, 3.0):
        return x * self.factor


def leaves_a_context_by_an_exception(self, x):
    with contextlib.suppress(ValueError), scaled(self, self.factor + 1):
        x = x * self.factor
        raise ValueError
    return x


def have_closures_over_a_loop(self):
    self.functions = [lambda x: x * i for i in range(3)]  # noqa: B023
    box = [0]

    def grow(x):
        box[0] += 1
        return x * box[0]

    self.grow = grow


def calls_closures_over_a_loop(self, x):
    for function in self.functions:
        x = function(x)
    return x


def calls_a_closure_that_grows(self, x):
    return self.grow(x)


def have_a_running_generator(self):
    def numbers():
        n = 1
        while True:
            n += (yield n) or 0

    self.numbers = numbers()
    next(self.numbers)


def sends_to_a_generator(self, x):
    return x * self.numbers.send(2)


class Target:
    n = 0


def have_weakrefs(self):
    self.target = Target()
    self.ref = weakref.ref(self.target)
    self.proxy = weakref.proxy(self.target)
    self.alive = weakref.WeakSet([self.target])


def counts_behind_a_weakref(self, x):
    self.ref().n += 1
    return x * self.ref().n


def counts_behind_a_proxy(self, x):
    self.proxy.n += 1
    return x * self.proxy.n


def keeps_a_weak_set(self, x):
    self.alive.add(Target())
    self.kept = list(self.alive)
    return x * len(self.alive)


def remembers_the_last(self, x):
    last, self.last = self.last, x
    return x if last is None else x - last


def works_with_numpy(self, x):
    return x + torch.from_numpy(np.tanh(x.detach().cpu().numpy())).to(x)


def have_an_array(self):
    self.array = np.zeros(4, dtype=np.float32)


def changes_an_array_by_a_tensor(self, x):
    torch.from_numpy(self.array).add_(1)
    return x * float(self.array[0])


def shares_an_array(self, x):
    y = x + torch.from_numpy(self.array).to(x)
    self.array += 1
    return y


def have_a_view_of_memory(self):
    self.bytes = bytearray(4)
    self.view = memoryview(self.bytes)


def changes_memory(self, x):
    self.view[0] += 1
    return x * self.bytes[0]


def have_a_threads_own(self):
    self.local = threading.local()
    self.local.n = 0


def counts_for_a_thread(self, x):
    self.local.n += 1
    return x * self.local.n


@functools.lru_cache
def mask(size, device):
    return torch.ones(size, device=device) * 2


def clears_a_cache_each_second_time(self, x):
    TOTALS[0] += 1
    if TOTALS[0] % 2 == 0:
        mask.cache_clear()
    return x * mask(4, x.device)


TOTALS = [0]


def makes_a_tensor_and_adds(self, x):
    total = torch.tensor(0.0, device=x.device)
    for part in x.unbind(1):
        total += part.sum()
    return x + total


def makes_a_tensor_and_adds_twice(self, x):
    total = torch.zeros((), device=x.device)
    count = torch.tensor([0.0, 1.0], device=x.device)
    count += x.mean()
    total.add_(count.sum())
    return x + total


def have_configurations(self):
    type(self).cfg = {"scale": 2.0, "steps": 0}


def reads_a_container_of_its_class(self, x):
    return x * type(self).cfg["scale"]


def counts_in_a_container_of_its_class(self, x):
    type(self).cfg["steps"] += 1
    return x * self.__class__.cfg["steps"]


def swaps_two_attributes(self, x):
    self.one, self.two = self.two, self.one
    return x * self.one


def have_two(self):
    self.one, self.two = 1.0, 2.0


CONTROL = [
    counts_in_a_global,
    counts_in_a_global_counter,
    counts_in_finally,
    recurses,
    (have_a_factor, works_in_a_context_of_its_own),
    (have_a_factor, leaves_a_context_by_an_exception),
    (have_closures_over_a_loop, calls_closures_over_a_loop),
    (have_closures_over_a_loop, calls_a_closure_that_grows),
    (have_a_running_generator, sends_to_a_generator),
    (have_weakrefs, counts_behind_a_weakref),
    (have_weakrefs, counts_behind_a_proxy),
    (have_weakrefs, keeps_a_weak_set),
    (have_none, remembers_the_last),
    works_with_numpy,
    (have_an_array, changes_an_array_by_a_tensor),
    (have_an_array, shares_an_array),
    (have_a_view_of_memory, changes_memory),
    (have_a_threads_own, counts_for_a_thread),
    clears_a_cache_each_second_time,
    makes_a_tensor_and_adds,
    makes_a_tensor_and_adds_twice,
    (have_configurations, reads_a_container_of_its_class),
    (have_configurations, counts_in_a_container_of_its_class),
    (have_two, swaps_two_attributes),
]


# ---------------------------------------------------------------------- weights and modules


def have_a_second_linear(self):
    self.second = nn.Linear(4, 4)
    self.n = 0


def have_an_average(self):
    self.average = copy.deepcopy(self.linear)
    self.n = 0


def swaps_weights(self, x):
    """An EMA: swapped in by ``data``, and out again."""
    own = [p.data for p in self.linear.parameters()]
    for p, q in zip(self.linear.parameters(), self.average.parameters(), strict=True):
        p.data = q.data * 2
    y = self.linear(x)
    for p, q in zip(self.linear.parameters(), own, strict=True):
        p.data = q
    return y


def updates_an_average(self, x):
    for p, q in zip(self.average.parameters(), self.linear.parameters(), strict=True):
        p.mul_(0.9).add_(q, alpha=0.1)
    return self.average(x)


def updates_an_average_by_data(self, x):
    for p, q in zip(self.average.parameters(), self.linear.parameters(), strict=True):
        p.data = p.data * 0.9 + q.data * 0.1
    return self.average(x)


def loads_weights(self, x):
    self.second.load_state_dict({k: v * 1.1 for k, v in self.second.state_dict().items()})
    return self.second(x)


def loads_weights_by_assignment(self, x):
    state = {k: v * 1.1 for k, v in self.second.state_dict().items()}
    self.second.load_state_dict(state, assign=True)
    return self.second(x)


def toggles_requires_grad(self, x):
    for p in self.second.parameters():
        p.requires_grad_(not p.requires_grad)
    return self.second(x)


def registers_a_buffer_again(self, x):
    self.register_buffer("scale", x.mean(0))
    return x * self.scale


def replaces_a_buffer(self, x):
    self.second.weight.data.mul_(1.1)
    self.register_buffer("count", getattr(self, "count", torch.zeros((), device=x.device)) + 1)
    return self.second(x) + self.count


def calls_by_functional(self, x):
    state = {k: v * 2 for k, v in self.second.named_parameters()}
    return torch.func.functional_call(self.second, state, (x,))


def have_weight_norm(self):
    self.second = parametrizations.weight_norm(nn.Linear(4, 4))


def have_old_weight_norm(self):
    self.second = torch.nn.utils.spectral_norm(nn.Linear(4, 4))
    self.second.train()


class Doubled(nn.Module):
    def forward(self, x):
        return x * 2


def have_a_parametrization(self):
    self.second = nn.Linear(4, 4)
    parametrize.register_parametrization(self.second, "weight", Doubled())


def calls_the_second(self, x):
    return self.second(x)


def caches_a_parametrization(self, x):
    with parametrize.cached():
        return self.second(x) + self.second(x + 1)


def removes_a_parametrization(self, x):
    y = self.second(x)
    if parametrize.is_parametrized(self.second):
        parametrize.remove_parametrizations(self.second, "weight")
    return y


def have_a_hooked_layer(self):
    self.second = nn.Linear(4, 4)
    self.features = {}
    self.second.register_forward_hook(lambda m, a, out: self.features.update(out=out))


def reads_what_a_hook_kept(self, x):
    self.second(x)
    return self.features.pop("out") + x


def have_a_quantized_layer(self):
    class Quantized(nn.Linear):
        def forward(self, x):
            scale = x.abs().amax().clamp(min=1e-6) / 127
            q = torch.clamp(torch.round(x / scale), -128, 127) * scale
            return F.linear(q, self.weight, self.bias)

    self.second = Quantized(4, 4)


def have_a_batch_norm(self):
    self.second = nn.BatchNorm1d(4)
    self.n = 0


def trains_a_batch_norm(self, x):
    self.second.train()
    y = self.second(torch.cat([x, x + 1]))[:1]
    self.second.eval()
    return y


def changes_the_momentum(self, x):
    self.second.train()
    self.n += 1
    self.second.momentum = 1 / self.n
    y = self.second(torch.cat([x, x + 1]))[:1]
    self.second.eval()
    return y


def have_a_dropout(self):
    self.second = nn.Dropout(0.5)
    self.second.train()


def drops_less_each_time(self, x):
    self.second.train()
    self.second.p = self.second.p * 0.9
    return self.second(x)


def drops_with_another_p_for_a_call(self, x):
    self.second.train()
    self.second.p = 0.9
    y = self.second(x)
    self.second.p = 0.5
    return y + self.second(x)


def works_under_autocast_sometimes(self, x):
    self.n += 1
    with torch.autocast(x.device.type, torch.bfloat16, enabled=self.n % 2 == 0):
        return self.second(x).float()


def works_with_gradients(self, x):
    with torch.inference_mode(False), torch.enable_grad():
        z = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((z * z).sum(), z)
    return x + gradient


def works_without_gradients(self, x):
    with torch.no_grad():
        return self.second(x)


def converts_a_module(self, x):
    self.second.double()
    return self.second(x.double()).float()


def replaces_a_layer_in_a_list(self, x):
    self.layers[0] = nn.Linear(4, 4).to(x.device)
    nn.init.ones_(self.layers[0].weight)
    nn.init.zeros_(self.layers[0].bias)
    return self.layers[0](x)


def have_layers(self):
    self.layers = nn.ModuleList([nn.Linear(4, 4)])


def goes_through_layers_in_turn(self, x):
    self.n += 1
    return (self.linear, self.second)[self.n % 2](x)


def prunes_a_weight(self, x):
    self.second.weight[0] = 0
    self.n += 1
    return self.second(x)


def writes_to_a_part_of_a_weight(self, x):
    self.second.weight[0].add_(1)
    return self.second(x)


def deep_copies_a_layer(self, x):
    return copy.deepcopy(self.second)(x)


WEIGHTS = [
    (have_an_average, swaps_weights),
    (have_an_average, updates_an_average),
    (have_an_average, updates_an_average_by_data),
    *((have_a_second_linear, work) for work in (
        loads_weights, loads_weights_by_assignment, toggles_requires_grad, registers_a_buffer_again,
        replaces_a_buffer, calls_by_functional, works_under_autocast_sometimes,
        works_with_gradients, works_without_gradients, converts_a_module,
        goes_through_layers_in_turn, prunes_a_weight, writes_to_a_part_of_a_weight,
        deep_copies_a_layer)),
    (have_weight_norm, calls_the_second),
    (have_old_weight_norm, calls_the_second),
    (have_a_parametrization, calls_the_second),
    (have_a_parametrization, caches_a_parametrization),
    (have_a_parametrization, removes_a_parametrization),
    (have_a_hooked_layer, reads_what_a_hook_kept),
    (have_a_quantized_layer, calls_the_second),
    (have_a_batch_norm, trains_a_batch_norm),
    (have_a_batch_norm, changes_the_momentum),
    (have_a_dropout, drops_less_each_time),
    (have_a_dropout, drops_with_another_p_for_a_call),
    (have_layers, replaces_a_layer_in_a_list),
]  # fmt: skip


# ------------------------------------------------------------------- between two batches


def between(self, action):
    """``action(self, batch_idx)`` runs before each batch, as in a hook of the user's."""
    self.on_validation_batch_start = lambda batch, batch_idx, dataloader_idx=0: action(
        self, batch_idx
    )


def have_hooks_that_load(self):
    have_a_second_linear(self)

    def load(self, batch_idx):
        if batch_idx == 5:
            self.second.load_state_dict({k: v + 1 for k, v in self.second.state_dict().items()})

    between(self, load)


def have_hooks_that_assign(self):
    have_a_second_linear(self)

    def assign(self, batch_idx):
        if batch_idx in (5, 6):
            self.second.load_state_dict(
                {k: v + 1 for k, v in self.second.state_dict().items()}, assign=True
            )

    between(self, assign)


def have_hooks_that_swap(self):
    have_an_average(self)
    self.second = self.linear

    def swap(self, batch_idx):
        self.second, self.average = self.average, self.second
        nn.init.constant_(self.second.weight, 0.1 * (batch_idx % 3))

    between(self, swap)


def have_hooks_that_freeze(self):
    have_a_second_linear(self)
    between(self, lambda self, i: self.second.requires_grad_(i % 2 == 0))


def have_hooks_that_hook(self):
    have_a_second_linear(self)

    def hook(self, i):
        if i == 5:
            self.second.register_forward_hook(lambda m, a, out: out * 2)
        if i == 6:
            self.second._forward_hooks.clear()

    between(self, hook)


def have_hooks_that_parametrize(self):
    have_a_second_linear(self)

    def change(self, i):
        if i == 5:
            parametrize.register_parametrization(self.second, "weight", Doubled())
        if i == 6:
            parametrize.remove_parametrizations(self.second, "weight")

    between(self, change)


def have_hooks_that_count(self):
    have_a_second_linear(self)
    self.scale = torch.ones(4)
    self.scales = [1.0, 2.0]

    def change(self, i):
        if i == 4:
            self.scales[0] = 5.0
        if i == 5:
            self.scale = self.scale.to(self.device) * 3
        if i == 6:
            self.scale.mul_(2)

    between(self, change)


def reads_what_hooks_change(self, x):
    return self.second(x) * self.scale.to(x.device) * self.scales[0]


def have_hooks_that_reset_parameters(self):
    have_a_batch_norm(self)

    def change(self, i):
        if i == 5:
            self.second.reset_parameters()
            self.second.running_mean.fill_(0.5)
        if i == 6:
            self.second.eps = 0.5
        if i == 7:
            self.second.momentum = None

    between(self, change)


def have_hooks_that_set_the_class(self):
    self.second = nn.Sequential(nn.ReLU())

    def change(self, i):
        if i == 5:
            self.second[0].__class__ = nn.Tanh

    between(self, change)


def have_hooks_that_patch_the_class(self):
    class Part(nn.Module):
        def forward(self, x):
            return self.helper(x)

        def helper(self, x):
            return x * 2

    self.second = Part()

    def change(self, i):
        if i == 5:
            Part.helper = lambda self, x: x * 3
        if i == 6:
            Part.forward = lambda self, x: x * 4

    between(self, change)


def have_hooks_that_rebind_a_function(self):
    def change(self, i):
        global helper
        if i == 5:
            helper = other_helper

    between(self, change)


def first_helper(x):
    return x * 2


def other_helper(x):
    return x * 5


helper = first_helper


def calls_a_function(self, x):
    return helper(x)


def have_hooks_that_replace_a_method(self):
    class Part(type(self)):
        def helper(self, x):
            return x * 2

    def change(self, i):
        if i == 5:
            Part.helper = lambda self, x: x * 3

    self.__class__ = Part
    between(self, change)


def calls_its_method(self, x):
    return self.helper(x)


def have_hooks_that_set_flags(self):
    have_a_second_linear(self)

    def change(self, i):
        torch.set_default_dtype(torch.float64 if i == 5 else torch.float32)

    between(self, change)


def reads_the_default_dtype(self, x):
    return (
        self.second(x)
        + torch.ones(4, device=x.device).sum().to(x.dtype)
        + (torch.get_default_dtype() is torch.float64)
    )


BETWEEN = [
    *((have, calls_the_second) for have in (
        have_hooks_that_load, have_hooks_that_assign, have_hooks_that_swap,
        have_hooks_that_freeze, have_hooks_that_hook, have_hooks_that_parametrize,
        have_hooks_that_reset_parameters, have_hooks_that_set_the_class,
        have_hooks_that_patch_the_class)),
    (have_hooks_that_count, reads_what_hooks_change),
    (have_hooks_that_rebind_a_function, calls_a_function),
    (have_hooks_that_replace_a_method, calls_its_method),
    (have_hooks_that_set_flags, reads_the_default_dtype),
]  # fmt: skip


def have_hyperparameters(self):
    self.save_hyperparameters({"scale": 2.0, "layers": [1, 2]})


def reads_hyperparameters(self, x):
    return x * self.hparams.scale * self.hparams["layers"][1]


def changes_hyperparameters(self, x):
    self.hparams.scale = self.hparams.scale + 1
    return x * self.hparams.scale


def writes_to_the_trainer(self, x):
    self.trainer.seen = getattr(self.trainer, "seen", 0) + 1
    return x * self.trainer.seen


def reads_the_state_of_the_trainer(self, x):
    if self.trainer.sanity_checking or self.trainer.training:
        return x * 3
    return x * 2 if self.trainer.validating else x


def writes_to_callback_metrics(self, x):
    self.trainer.callback_metrics["own"] = x.mean()
    return x


def reads_callback_metrics(self, x):
    return x * (1 + len(self.trainer.callback_metrics))


def stops_the_trainer(self, x):
    self.trainer.should_stop = True
    return x


def sets_the_limit(self, x):
    return x * float(self.trainer.limit_val_batches)


OF_LIGHTNING = [
    (have_hyperparameters, reads_hyperparameters),
    (have_hyperparameters, changes_hyperparameters),
    writes_to_the_trainer,
    reads_the_state_of_the_trainer,
    writes_to_callback_metrics,
    reads_callback_metrics,
    stops_the_trainer,
    sets_the_limit,
]


def reset() -> None:
    """The state that this module holds, as it is before any row."""
    global TOTAL, helper
    TOTAL, DEPTH[:], TOTALS[:] = 0, [0], [0]
    CALLS.clear()
    counted.calls = 0
    mask.cache_clear()
    Described.__dict__["counted"].reads = 0
    torch.set_default_dtype(torch.float32)
    helper = first_helper


def world() -> list[Any]:
    """What a step may have changed there."""
    return [TOTAL, DEPTH, TOTALS, CALLS, Described.__dict__["counted"].reads, counted.calls]
