"""Steps that compare ``batch_idx``: the outcomes are part of what a graph is used for."""

from __future__ import annotations

import functools
import itertools
import types
from typing import Any

import pytest
import torch
from torch import nn

from cg_lightning import diagnose
from cg_lightning.core.causes import Cause
from cg_lightning.diagnosis.uses_of_argument import ArgumentUses
from tests.harness import features, predict
from tests.models import Body, Predictor

LIMIT = 3
SCALERS: list[Any] = []
NAMES = [str(number) for number in range(40)]


def helper(x, batch_idx):
    return x * 2 if batch_idx == 2 else x


def helper_that_uses(x, batch_idx):
    return x * batch_idx


def compares_self(self, batch, batch_idx):  # no method: ``self`` is any object
    return self.scale_by(batch, batch_idx)


class Other:
    def __rmul__(self, x):
        return x * 2

    def net(self, x):
        return x

    def scale_by(self, x, batch_idx):
        return x * batch_idx


def passes_on(step):
    @functools.wraps(step)
    def decorated(*args, **kwargs):
        return step(*args, **kwargs)

    return decorated


def keeps_the_arguments(step):
    @functools.wraps(step)
    def decorated(*args, **kwargs):
        args[0].scale = float(sum([*args][2:3]))
        return step(*args, **kwargs)

    return decorated


def tells_another(step):
    def scales(self, batch, batch_idx):
        return batch[0] * batch_idx

    @functools.wraps(step)
    def decorated(*args, **kwargs):
        return step(*args, **kwargs) + scales(*args)

    return decorated


def scaled(module, factor, batch, batch_idx):
    return module.net(batch[0]) * (factor if batch_idx % 2 else 1)


def named(module, batch, batch_idx, factor):
    return module.net(batch[0]) * factor


class Base(Predictor):
    """Has what the steps below need."""

    def __init__(self) -> None:
        super().__init__(Body())
        self.every = 3
        self.first = 1
        self.names = NAMES
        self.other = Other()
        self.register_buffer("two", torch.tensor(2))
        self.scale = 1.0
        self.limit = 5
        self.hparams["rate"] = 4

    def leaves_early(self, x, batch_idx):
        if batch_idx > 0:
            return x
        return x * float(str(batch_idx + 3))

    def scale_by(self, x, batch_idx):
        return x * 3 if batch_idx % self.every == 1 else x

    def uses(self, x, batch_idx):
        return x * batch_idx

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0])


def first(self, batch, batch_idx):
    return self.net(batch[0]) * (2 if batch_idx == 0 else 1)


def every_third(self, batch, batch_idx):
    x = self.net(batch[0])
    if not batch_idx % 3:
        x = x + 1
    return x


def every_of_an_attribute(self, batch, batch_idx):
    x = self.net(batch[0])
    if batch_idx % self.every == 0:
        x = x + 1
    return x


def against_a_global(self, batch, batch_idx):
    return self.net(batch[0]) - (1 if batch_idx >= LIMIT else 0)


def between(self, batch, batch_idx):
    return self.net(batch[0]) - (1 if 2 <= batch_idx < 2 + self.first + 3 else 0)


def truth(self, batch, batch_idx):
    return self.net(batch[0]) if batch_idx and self.every else batch[0]


def in_a_list(self, batch, batch_idx):
    return self.net(batch[0]) * (3 if batch_idx in (1, 5, 6) else 1)


def in_a_loop(self, batch, batch_idx):
    x = self.net(batch[0])
    for number in range(3):
        if batch_idx % 3 == number:
            x = x * (number + 1)
    return x


def in_a_comprehension(self, batch, batch_idx):
    return self.net(batch[0]) * sum([number for number in (1, 2, 3) if batch_idx % 2 == number - 1])


def arithmetic(self, batch, batch_idx):
    x = self.net(batch[0])
    return x * 2 if (batch_idx * 2 + 1) // 3 - 1 > 1.5 else x


def outcome_as_a_number(self, batch, batch_idx):
    return self.net(batch[0]) * (batch_idx % 2 == 0)


def to_a_method(self, batch, batch_idx):
    return self.scale_by(self.net(batch[0]), batch_idx)


def to_a_method_by_name(self, batch, batch_idx):
    return self.scale_by(self.net(batch[0]), batch_idx=batch_idx)


def to_a_function(self, batch, batch_idx):
    return helper(self.net(batch[0]), batch_idx)


def deleted(self, batch, batch_idx):
    del batch_idx
    return self.net(batch[0])


def none(self, batch, batch_idx):
    return self.net(batch[0]) * (2 if batch_idx is not None else 1)


def nested_ifs(self, batch, batch_idx):
    x = self.net(batch[0])
    if batch_idx > 1:
        if batch_idx % 2 == 0:
            return x * 2
        return x * 3 if batch_idx < 7 else x * 4
    return x


def alternating_output(self, batch, batch_idx):
    x = self.net(batch[0])
    return {"even": x} if batch_idx % 2 == 0 else (x, x + 1)


def asserts(self, batch, batch_idx):
    if not batch_idx >= 0:
        raise ValueError(batch)
    return self.net(batch[0])


COMPARES = [
    *(first, every_third, every_of_an_attribute, against_a_global, between, truth, in_a_list),
    *(in_a_loop, in_a_comprehension, arithmetic, outcome_as_a_number, to_a_method),
    *(to_a_method_by_name, to_a_function, deleted, none, nested_ifs, alternating_output, asserts),
]


def multiplies(self, batch, batch_idx):
    return self.net(batch[0]) * batch_idx


def into_an_int(self, batch, batch_idx):
    return self.net(batch[0]) * int(batch_idx)


def compares_with_a_tensor(self, batch, batch_idx):
    return self.net(batch[0]) * (batch_idx == self.two)


def tensor_first(self, batch, batch_idx):
    return self.net(batch[0]) * (self.two == batch_idx)


def tensor_modulo(self, batch, batch_idx):
    return self.net(batch[0]) * (batch_idx % self.two > 0)


def of_text(self, batch, batch_idx):
    return self.net(batch[0]) * len(f"{batch_idx}")


def formatted(self, batch, batch_idx):
    return self.net(batch[0]) * float("%d" % batch_idx)  # noqa: UP031


def as_a_key(self, batch, batch_idx):
    return self.net(batch[0]) * {0: 2.0, 4: 3.0}.get(batch_idx, 1.0)


def in_a_set(self, batch, batch_idx):
    return self.net(batch[0]) * (2 if batch_idx in {1, 4, 6} else 1)


def as_an_index(self, batch, batch_idx):
    return self.net(batch[0]) * float(self.names[batch_idx])


def in_a_range(self, batch, batch_idx):
    return self.net(batch[0]) * len(range(batch_idx))


def types_it(self, batch, batch_idx):
    return self.net(batch[0]) * (2 if type(batch_idx) is int else 1) + (batch_idx > 3)


def identity(self, batch, batch_idx):
    zero = 0
    return self.net(batch[0]) * (2 if batch_idx is zero else 1)


def by_another_name(self, batch, batch_idx):
    number = batch_idx
    return self.net(batch[0]) * number


def added_to(self, batch, batch_idx):
    batch_idx += 1
    return self.net(batch[0]) * batch_idx


def rest(self, batch, batch_idx):
    number = batch_idx % 4
    return self.net(batch[0]) * number


def either(self, batch, batch_idx):
    return self.net(batch[0]) * (batch_idx or 7)


def in_locals(self, batch, batch_idx):
    return self.net(batch[0]) * locals()["batch_idx"]


def in_vars(self, batch, batch_idx):
    return self.net(batch[0]) * vars()["batch_idx"]


def evaluated(self, batch, batch_idx):
    return self.net(batch[0]) * eval("batch_idx")


def closed_over(self, batch, batch_idx):
    def scale(x):
        return x * batch_idx

    return scale(self.net(batch[0]))


def in_a_lambda(self, batch, batch_idx):
    return (lambda x: x * 2 if batch_idx == 1 else x)(self.net(batch[0]))


def to_a_method_that_uses(self, batch, batch_idx):
    return self.uses(self.net(batch[0]), batch_idx)


def to_a_function_that_uses(self, batch, batch_idx):
    return helper_that_uses(self.net(batch[0]), batch_idx)


def to_another_self(self, batch, batch_idx):
    return compares_self(self.other, self.net(batch[0]), batch_idx)


def in_a_match(self, batch, batch_idx):
    match batch_idx:
        case 0 | 5:
            return self.net(batch[0]) * 2
    return self.net(batch[0])


def to_torch(self, batch, batch_idx):
    return self.net(batch[0]) + torch.full((8,), batch_idx, device=batch[0].device)


def many(self, batch, batch_idx):
    return self.net(batch[0]) * sum([1 for number in range(50) if batch_idx == number])


USES = [
    *(multiplies, into_an_int, compares_with_a_tensor, tensor_first, tensor_modulo, of_text),
    *(formatted, as_a_key, in_a_set, as_an_index, in_a_range, types_it, identity),
    *(by_another_name, added_to, rest, either, in_locals, in_vars, evaluated, closed_over),
    *(in_a_lambda, to_a_method_that_uses, to_a_function_that_uses, to_another_self, in_a_match),
    *(to_torch, many),
]


def in_a_rare_branch(self, batch, batch_idx):
    x = self.net(batch[0])
    if batch_idx % 5 == 0:
        x = x * len(f"number {batch_idx}")
    return x


def of_an_attribute_in_a_rare_branch(self, batch, batch_idx):
    x = self.net(batch[0])
    if self.first and batch_idx % self.every == 0 and batch_idx < 100:
        return x * int(batch_idx)
    return x


def of_a_hyperparameter(self, batch, batch_idx):
    x = self.net(batch[0])
    return x + float(str(batch_idx)) if not batch_idx % self.hparams.rate else x


def in_the_other_branch(self, batch, batch_idx):
    x = self.net(batch[0])
    if batch_idx > 3:
        return x
    else:  # noqa: RET505
        return x * float(str(batch_idx))


def after_a_return(self, batch, batch_idx):
    x = self.net(batch[0])
    if batch_idx not in (0, 1) and batch_idx in (0, 7):
        return x * 2
    if batch_idx >= 2:
        return x
    return x * [3, 4][batch_idx]


def in_a_method_after_a_return(self, batch, batch_idx):
    return self.leaves_early(self.net(batch[0]), batch_idx)


def handed_on_in_a_rare_branch(self, batch, batch_idx):
    x = self.net(batch[0])
    if batch_idx in (1, 6):
        x = self.uses(x, batch_idx=batch_idx)
    return x if 0 != batch_idx else helper_that_uses(x, batch_idx)  # noqa: SIM300


def by_short_circuit(self, batch, batch_idx):
    x = self.net(batch[0])
    return x, 2 <= batch_idx < 4 and x * float(str(batch_idx))


def in_a_lambda_of_a_rare_branch(self, batch, batch_idx):
    x = self.net(batch[0])
    if batch_idx == 2:
        return (lambda: x * batch_idx)()
    return x


RARELY = [
    *(in_a_rare_branch, of_an_attribute_in_a_rare_branch, of_a_hyperparameter),
    *(in_the_other_branch, after_a_return, in_a_method_after_a_return),
    *(handed_on_in_a_rare_branch, by_short_circuit, in_a_lambda_of_a_rare_branch),
]


def sets_what_it_compares_with(self, batch, batch_idx):
    self.limit = 1  # 5 outside of the step
    x = self.net(batch[0])
    if batch_idx % self.limit == 0:
        x = x * float(str(batch_idx))
    self.limit = 5
    return x


def sets_the_name(self, batch, batch_idx):
    x = self.net(batch[0])
    kept, batch_idx = batch_idx, 0
    if batch_idx == 0:
        batch_idx = kept
        x = x * float(str(batch_idx))
    return x


def by_either(self, batch, batch_idx):
    x = self.net(batch[0])
    if batch_idx == 3 or self.every:
        x = x * float(str(batch_idx))
    return x


def in_the_common_branch(self, batch, batch_idx):
    x = self.net(batch[0])
    if batch_idx != 3:
        x = x * float(str(batch_idx))
    return x


def compares_another_variable_inside(self, batch, batch_idx):
    def scale(x, batch_idx):
        if batch_idx == 100:
            return x
        return x * float(str(number()))

    def number():
        return batch_idx

    return scale(self.net(batch[0]), 4)


def the_loop_goes_on(self, batch, batch_idx):
    x = self.net(batch[0])
    for number in (1, 2):
        if batch_idx >= number:
            continue
        x = x + number
    return x * float(str(batch_idx))


IN_BRANCHES = [
    *(sets_what_it_compares_with, sets_the_name, by_either, in_the_common_branch),
    *(compares_another_variable_inside, the_loop_goes_on),
]


MODES = [
    pytest.param("FULL", 2, marks=pytest.mark.exhaustive),
    ("FULL_AND_PIECEWISE", 2),
    ("FULL_AND_PIECEWISE", 0),
    ("PIECEWISE", 0),
]


def module_with(step: Any) -> Base:
    return type("Steps", (Base,), {"predict_step": step})()


def run(harness, step, mode, verify, job=None):
    callback = harness.callback(mode=mode, verify_replays=verify, warmup_steps=1)
    return harness.compare(module_with(step), job or predict(features(48)), callback)


@pytest.mark.in_turn("mode")
@pytest.mark.parametrize("step", COMPARES, ids=lambda step: step.__name__)
@pytest.mark.parametrize(("mode", "verify"), MODES)
def test_steps_that_compare_it_are_graphs(harness, step, mode, verify):
    """Hazard 7."""
    callback = run(harness, step, mode, verify)
    if mode != "PIECEWISE":
        assert callback.stats.steps["FULL"] >= 4, callback.summary()


@pytest.mark.parametrize("step", RARELY, ids=lambda step: step.__name__)
@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "FULL"])
def test_uses_in_a_rare_branch_leave_the_others_graphs(harness, step, mode):
    """Hazard 7."""
    callback = run(harness, step, mode, 0)
    assert callback.stats.steps["FULL"] >= 6, callback.summary()


@pytest.mark.parametrize("step", IN_BRANCHES, ids=lambda step: step.__name__)
@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "FULL"])
def test_branches_that_prove_nothing_about_a_use(harness, step, mode):
    """Hazard 7."""
    callback = run(harness, step, mode, 0)
    assert callback.stats.steps["FULL"] <= 1, callback.summary()


@pytest.mark.in_turn("mode")
@pytest.mark.parametrize("step", USES, ids=lambda step: step.__name__)
@pytest.mark.parametrize(("mode", "verify"), MODES)
def test_steps_that_use_it_are_no_graphs(harness, step, mode, verify):
    """Hazard 7."""
    callback = run(harness, step, mode, verify)
    assert callback.stats.steps["FULL"] == 0
    if mode == "FULL":
        kinds = {record.reason.kind for record in callback.stats.reasons}
        assert Cause.BATCH_INDEX_USED in kinds, callback.summary()


@pytest.mark.parametrize(
    ("decorator", "is_graph"),
    [
        (passes_on, True),
        (torch.no_grad(), True),
        (lambda step: passes_on(torch.inference_mode()(step)), True),
        (keeps_the_arguments, False),
        (tells_another, False),
    ],
)
def test_decorated_steps(harness, decorator, is_graph):
    callback = run(harness, decorator(every_third), "FULL_AND_PIECEWISE", 0)
    assert (callback.stats.steps["FULL"] > 0) == is_graph, callback.summary()


def test_the_rare_branch_is_eager_and_the_common_one_a_graph(harness, capsys):
    """``if batch_idx == 0: log an image`` is what people write."""

    class Prints(Base):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x = self.net(batch[0])
            if batch_idx == 0:
                print("first", x.sum().item())
            self.log("mean", x.mean())

    fit = lambda trainer, module: trainer.fit(module, features(4), features(40))
    callback = harness.compare(Prints(), fit, max_epochs=4, num_sanity_val_steps=0)
    assert capsys.readouterr().out.count("first") == 8
    steps = callback.stats.steps
    # eager: two watched steps, and a warm-up; then the rare branch is what stays lower
    assert (steps["FULL"], steps["PIECEWISE"]) == (34, 3), callback.summary()
    (record,) = [record for record in callback.stats.reasons if record.mode == "PIECEWISE"]
    assert record.reason.kind in (Cause.PRINTED, Cause.HOST_SYNC)


def test_a_branch_that_comes_late(harness):
    class Late(Base):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            x = self.net(batch[0])
            if batch_idx == 9:
                return x * float(x.sum().item())
            return x

    callback = harness.compare(Late(), predict(features(60)))
    assert callback.stats.steps["FULL"] >= 10, callback.summary()


def test_the_first_batch_is_unlike_all_others(harness):
    """The eager branch comes first: the step must be watched again where it takes the other."""

    class Unlike(Base):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx < 1:
                return {"sum": self.net(batch[0]).sum().item()}
            return self.net(batch[0])

    callback = harness.compare(Unlike(), predict(features(60)))
    assert callback.stats.steps["FULL"] >= 10, callback.summary()


def test_two_branches_with_the_same_reason(harness):
    """``in (0, 1)`` has three sets of outcomes; only two of them print."""

    class Prints(Base):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            x = self.net(batch[0])
            if batch_idx in (0, 1):
                print("first")
            return x

    callback = harness.compare(Prints(), predict(features(60)))
    assert callback.stats.steps["FULL"] >= 11, callback.summary()


def test_pieces_alone_need_no_branches(harness):
    """With mode PIECEWISE a step is watched once, whatever its comparisons come out as."""
    callback = harness.callback(mode="PIECEWISE", warmup_steps=1)
    harness.compare(module_with(in_a_loop), predict(features(40)), callback)
    assert callback.stats.steps["PIECEWISE"] == 9, callback.summary()


def test_both_branches_wait_for_the_device(harness):
    """If the reason is in all branches, the step is watched no more often than before."""

    class Waits(Base):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            x = self.net(batch[0])
            number = 2 * x.sum().item()
            for every in range(1, 8):
                if batch_idx % every == 0:
                    x = x + every
            return x, number

    callback = harness.compare(Waits(), predict(features(120)))
    assert callback.stats.steps["PIECEWISE"] >= 24, callback.summary()


def test_an_attribute_that_changes_what_is_compared(harness):
    class Changes(Base):
        def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0):
            self.every = 2 if batch_idx < 6 else 5

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            x = self.net(batch[0])
            return x * 2 if batch_idx % self.every == 0 else x

    callback = harness.compare(Changes(), predict(features(100)))
    assert callback.stats.steps["FULL"] >= 8, callback.summary()


def test_two_loaders_and_two_stages(harness):
    class Two(Base):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            x = self.net(batch[0])
            if batch_idx == 1 and dataloader_idx == 1:
                x = x * 2
            self.log("mean", x.mean())

        def test_step(self, batch: Any) -> None:
            self.log("test", self.net(batch[0]).mean())

    def job(trainer, module):
        loaders = [features(32), features(40)]
        return [
            trainer.validate(module, loaders, verbose=False),
            trainer.test(module, features(32), verbose=False),
            trainer.validate(module, loaders, verbose=False),
        ]

    callback = harness.compare(Two(), job)
    assert callback.stats.steps["FULL"] >= 20, callback.summary()


def test_an_exception_of_the_rare_branch(harness):
    class Raises(Base):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 7:
                raise ValueError("seven")
            return self.net(batch[0])

    with pytest.raises(ValueError, match="seven"):
        harness.trainer(harness.callback()).predict(Raises(), features(40))


def closure_without(module):
    return lambda batch, batch_idx: module.net(batch[0])


def closure_that_multiplies(module):
    return lambda batch, batch_idx: module.net(batch[0]) * batch_idx


def closure_that_compares(module):
    return lambda batch, batch_idx: module.net(batch[0]) + (batch_idx == 3)


@pytest.mark.parametrize(
    ("make", "is_graph"),
    [
        (lambda module: functools.partial(first, module), True),
        (lambda module: functools.partial(multiplies, module), False),
        (lambda module: types.MethodType(first, module), True),
        (lambda module: types.MethodType(multiplies, module), False),
        (lambda module: types.MethodType(to_a_method, module), True),
        (lambda module: types.MethodType(to_a_method, Other()), False),
        (lambda module: types.MethodType(first, Other()), False),
        (lambda module: functools.partial(scaled, module, 2.0), True),
        (lambda module: functools.partial(named, module, factor=2.0), False),
        (lambda module: functools.partial(scaled, module, Other()), False),
        (closure_without, True),
        (closure_that_multiplies, False),
        (closure_that_compares, True),
    ],
)
def test_a_step_set_on_an_instance(harness, make, is_graph):
    outputs = []
    for extra in ([callback := harness.callback(warmup_steps=1)], []):
        torch.manual_seed(1)
        module = Base()
        module.predict_step = make(module)
        outputs.append(harness.trainer(*extra).predict(module, features(48)))
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert (callback.stats.steps["FULL"] > 0) == is_graph, callback.summary()


def test_what_a_step_on_an_instance_is_bound_to(harness):
    """A method of another object, whose attribute changes: nobody sees the read."""

    class Scaler:
        scale = 1.0

        def __init__(self, module: Any) -> None:
            self.module = module

        def step(self, batch, batch_idx):
            return self.module.net(batch[0]) * self.scale

    class Scales(Base):
        def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0):
            SCALERS[-1].scale = float(batch_idx)

    outputs = []
    for extra in ([harness.callback(warmup_steps=1, verify_replays=0)], []):
        torch.manual_seed(1)
        module = Scales()
        SCALERS.append(Scaler(module))
        module.predict_step = SCALERS[-1].step
        outputs.append(harness.trainer(*extra).predict(module, features(48)))
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_method_set_on_an_instance_is_the_one_that_is_read(harness):
    module = module_with(to_a_method)
    module.scale_by = helper_that_uses
    callback = harness.compare(module, predict(features(40)))
    assert callback.stats.steps["FULL"] == 0


def test_source_that_is_no_longer_that_of_the_code(harness, tmp_path):
    """A file that was edited since its import proves nothing about the code that runs."""
    file = tmp_path / "edited.py"
    text = "def step(self, batch, batch_idx):\n    return self.net(batch[0]) * {}\n"
    file.write_text(text.format("batch_idx"))
    names: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), names)
    file.write_text(text.format("(batch_idx == 3)"))
    callback = harness.compare(module_with(names["step"]), predict(features(40)))
    assert callback.stats.steps["FULL"] == 0


def test_offline():
    x = (torch.randn(2, 8),)
    assert diagnose(module_with(every_third), x).capturable()
    (finding,) = diagnose(module_with(multiplies), x).findings
    assert finding.cause is Cause.BATCH_INDEX_USED
    assert ": " not in finding.location
    (finding,) = diagnose(module_with(compares_with_a_tensor), x).findings
    assert (finding.cause, finding.operation) == (Cause.BATCH_INDEX_USED, "batch_idx == Tensor")


def test_inherited_steps(harness):
    class Parent(Base):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]) * (2 if batch_idx % 2 else 1)

    class Child(Parent):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return super().predict_step(batch, batch_idx) + (1 if batch_idx == 4 else 0)

    class Multiplies(Parent):
        def scale_by(self, x, batch_idx):
            return x * batch_idx

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.scale_by(super().predict_step(batch, batch_idx), batch_idx)

    callback = harness.compare(Child(), predict(features(60)))
    assert callback.stats.steps["FULL"] >= 6, callback.summary()
    assert harness.compare(Multiplies(), predict(features(40))).stats.steps["FULL"] == 0


def test_validation_inside_fit(harness):
    class Fits(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x = self.net(batch[0])
            self.log("mean", x.mean() if batch_idx % 2 else x.max())

    fit = lambda trainer, module: trainer.fit(module, features(8), features(40))
    callback = harness.compare(Fits(), fit, max_epochs=3)
    assert callback.stats.steps["FULL"] >= 15, callback.summary()


def test_all_numbers_come_out_as_eagerly():
    """Each comparison of a watched number is evaluated later as Python evaluates it."""
    from cg_lightning.guards.comparisons import ComparedNumber, ComparisonNotes

    signs = ("==", "!=", "<", "<=", ">", ">=")
    for number, sign, other in itertools.product((0, 1, 7), signs, (0, 1, 2.5, True, float("nan"))):
        notes = ComparisonNotes(pytest.fail)
        for text in (f"n {sign} other", f"n % 3 {sign} other", f"n // 2 + 1 {sign} other"):
            made = eval(text, {"n": ComparedNumber.of(number, notes), "other": other})
            assert made is eval(text, {"n": number, "other": other})
        for comparison, outcome in notes.outcomes.items():
            assert comparison.outcome(number) is outcome


LEAVES = [
    *("batch_idx in (0, 2)", "batch_idx == -1", "1 < batch_idx <= 3", "2 > batch_idx"),
    *("batch_idx - 3", "not batch_idx", "batch_idx % 2 != 0 or batch_idx // 2 == 1"),
    *("batch_idx * 2 + 1 in [1, 5]", "batch_idx < 2.5", "batch_idx >= self.every"),
]


@pytest.mark.parametrize(
    "form", ["if {}:\n  return\n use", "if not ({}):\n  use", "1 if {} else use"]
)
@pytest.mark.parametrize("test", LEAVES)
def test_a_line_runs_only_where_its_conditions_hold(tmp_path, test, form):
    """If they did not hold, a graph would keep the number that the line has used."""
    file = tmp_path / "step.py"
    body = form.format(test).replace("use", "self.used.append(str(batch_idx))")
    file.write_text(f"def predict_step(self, batch, batch_idx):\n {body}\n")
    exec(compile(file.read_text(), file, "exec", dont_inherit=True), namespace := {})
    module = type("Step", (nn.Module,), {**namespace, "every": 4})()
    (use,) = ArgumentUses(module).find("predict_step", 1)
    left_out = 0
    for number in range(-2, 9):
        module.used = []
        module.predict_step(None, number)
        holds = all(condition.holds(number) for condition in use.conditions)
        assert holds or not module.used, number
        left_out += not holds
    assert 0 < left_out < 11
