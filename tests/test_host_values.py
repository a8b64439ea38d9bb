"""Values that a step reads on the host and that depend on its batch alone: a graph for each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cg_lightning import CUDAGraphError, diagnose, graphed
from cg_lightning.core.reasons import Status
from cg_lightning.plain_loop import Graphed
from tests.harness import assert_same

Batch = dict[str, Any]


class Net(nn.Module):
    """A network whose forward is one of the steps below."""

    def __init__(self, step: Callable[[Any, Batch], Any]) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("chosen", torch.tensor([True, False, True, True, False, True]))
        self.flag = True
        self._step = step

    def forward(self, batch: Batch) -> Any:
        return self._step(self, batch)


def batches(device: torch.device, number: int = 24) -> Iterator[Batch]:
    """Yield masks of ones, and padded ones; the first batch is unlike most others."""
    generator = torch.Generator().manual_seed(1)
    for index in range(number):
        mask = torch.ones(3, 6, dtype=torch.long)
        if index % 3 == 1:
            mask[0, 3:] = 0
        if index % 3 == 2:
            mask[0, 3:], mask[2, 5:] = 0, 0
        if index % 7 == 5:
            mask[0, 0] = 0
        x = torch.randn(3, 6, 8, generator=generator)
        yield {"x": x.to(device), "m": mask.to(device)}


def run(
    step: Callable[[Any, Batch], Any],
    backend: str,
    device: torch.device,
    given: list[Batch] | None = None,
    context: Any = torch.inference_mode,
    between: Callable[[Net, int], None] = lambda net, index: None,
    **options: Any,
) -> Graphed:
    """Run a step with and without graphs on the same batches, and compare all that it gives."""
    torch.manual_seed(0)
    net = Net(step).eval().to(device)
    reference = copy.deepcopy(net)
    given = list(batches(device)) if given is None else given
    outputs, expected = [], []
    options = {"min_saving": 0, **options}
    with context(), graphed(net, backend=backend, **options) as call:
        for index, batch in enumerate(given):
            for module in (net, reference):
                between(module, index)
            torch.manual_seed(index)
            outputs.append(call(batch))
            torch.manual_seed(index)
            expected.append(reference(copy.deepcopy(batch)))
    assert_same(outputs, expected)
    assert_same(dict(net.state_dict()), dict(reference.state_dict()))
    return call


def mask_check(net, b):
    return net.lin(b["x"]) if b["m"].all() else net.lin(b["x"]) * b["m"].unsqueeze(-1)


def same_read_twice(net, b):
    if b["m"].all() and bool(b["m"].all()):
        return net.lin(b["x"])
    return net.lin(b["x"]) * b["m"].unsqueeze(-1)


def number_of_reads_depends_on_values(net, b):
    if b["m"][:, :1].all():
        return net.lin(b["x"]) if b["m"].all() else net.lin(b["x"]) + 1
    return net.lin(b["x"]) - 1


def loop_until_a_value(net, b):
    n, x = 0, b["x"]
    while n < int(b["m"].sum(1).max()):
        x = x + 1
        n += 3
    return net.lin(x)


def written_through_a_view(net, b):
    m = b["m"].clone()
    m[:, 0].fill_(1)
    m.view(-1)[-1:].zero_()
    return net.lin(b["x"]) if m.all() else net.lin(b["x"]) + m.unsqueeze(-1)


def written_between_reads(net, b):
    m = b["m"].clone()
    first = int(m.sum())
    m[0].fill_(1)
    return net.lin(b["x"]) * first if m.all() else net.lin(b["x"]) - first


def value_in_tensor(net, b):
    return net.lin(b["x"]) if 0 in b["m"][:, -1] else net.lin(b["x"]) + 1


def equal_to_constant(net, b):
    same = torch.equal(b["m"], torch.ones_like(b["m"]))
    return net.lin(b["x"]) if same else net.lin(b["x"]) + 1


def slice_by_tensor(net, b):
    return net.lin(b["x"][:, : b["m"].sum(1).max()])


def constant_read(net, b):
    p = torch.arange(b["x"].shape[1], device=b["x"].device)
    return net.lin(b["x"]) if (p.diff() == 1).all() else b["x"]


def check_that_raises(net, b):
    if not (b["m"].sum(1) > 0).all():
        raise ValueError("empty row")
    return net.lin(b["x"])


def comparison_of_floats(net, b):
    return net.lin(b["x"]) if (b["x"] > -100).all() else b["x"]


def value_in_output(net, b):
    return {"y": net.lin(b["x"]), "n": b["m"].sum().item(), "all": bool(b["m"].all())}


def changes_and_casts(net, b):
    m = (b["m"].float() > 0.5).to(torch.uint8).bool() & (b["m"] != 7)
    return net.lin(b["x"])[:, 1:] if (~m).any() else net.lin(b["x"])


def in_a_submodule(net, b):
    return _Inside.apply_to(net, b)


class _Inside:
    @staticmethod
    def apply_to(net, b):
        return net.lin(b["x"] * 2) if b["m"][0].all() else net.lin(b["x"])


def caught_error(net, b):
    try:
        b["m"].item()
    except RuntimeError:
        return net.lin(b["x"])
    return b["x"]


def rows_of_a_mask(net, b):
    return net.lin(b["x"])[b["m"].bool()]


def rows_that_are_not_zero(net, b):
    index = (b["m"] >= 1).nonzero()
    return net.lin(b["x"])[index[:, 0], index[:, 1]] if index.size(0) else net.lin(b["x"])[:0, 0]


def where_of_one_argument(net, b):
    rows, columns = torch.where(b["m"] == 1)
    return net.lin(b["x"])[rows, columns].sum(), rows.max(), columns


def selected_by_a_mask(net, b):
    return net.lin(b["x"]).masked_select(b["m"].bool().unsqueeze(-1)).mean()


def put_by_a_mask(net, b):
    y = net.lin(b["x"])
    mask = b["m"] == 1
    y[mask] = y[mask].softmax(0) * 2
    return y


def added_by_a_mask(net, b):
    y = torch.zeros(3, 6, 8, device=b["x"].device)
    mask = b["m"] != 1
    return y.index_put((mask,), net.lin(b["x"])[mask], accumulate=True)


def mask_of_one_dimension(net, b):
    mask = b["m"][:, -1] == 1
    return net.lin(b["x"])[mask], net.lin(b["x"])[:, b["m"][0].bool(), 2], mask.nonzero()


def no_rows(net, b):
    return net.lin(b["x"])[b["m"] > 5], (b["m"][:0] > 5).nonzero()


def index_of_a_list(net, b):
    """transformers' ``warn_if_padding_and_no_attention_mask``."""
    return net.lin(b["x"]) if 0 in b["m"][:, [-1, 0]] else net.lin(b["x"]) + 1


def constants_in_a_read(net, b):
    rows = torch.tensor([0, 1], device=b["m"].device)
    first = b["m"][rows, [-1, 0]].all()
    rows += 1
    b["m"].new_tensor([3, 4])
    second = torch.isin(b["m"][rows], torch.tensor([1, 2], device=b["m"].device)).all()
    return net.lin(b["x"]) * 2 if first else net.lin(b["x"]) if second else b["x"]


def set_by_a_list(net, b):
    m = b["m"].clone()
    m[:, [3, 4, 5]] = 1
    m[[True, False, False]] = 0
    n = int(b["m"][np.array([0, 1])].sum())
    return m, net.lin(b["x"]) * n, net.lin(b["x"])[:, [0, n % 5]]


def mask_in_a_list(net, b):
    wide = net.lin(b["x"])[[True, False, True]]
    return wide[:, [False, True] * 3] if b["m"][[0, 2]][:, [True] * 6].all() else wide


def set_numbers(net, b):
    m = b["m"].clone()
    m[m == 0] = 7
    m[0] = 1
    m[:, 1:3] = 1
    m[1, 0] = 1
    y = net.lin(b["x"])
    return y[m > 1] if (m == 1).all() else y[m == 7].sum(0), m


def set_by_lengths(net, b):
    """wav2vec2's mask: a mark at the last frame, and a sum from the end."""
    lengths = b["m"].sum(-1)
    m = torch.zeros_like(b["m"])
    m[(torch.arange(3, device=m.device), lengths - 1)] = 1
    m = m.flip([-1]).cumsum(-1).flip([-1]).bool()
    y = net.lin(b["x"])
    y[~m] = 0
    return y if m.all() else y[m].mean(0)


def set_twice_in_one_place(net, b):
    m = torch.zeros_like(b["m"])
    m[b["m"][:, 0], b["m"][:, 1]] = 1
    m.scatter_(1, b["m"], 2)
    return net.lin(b["x"])[m == 1].sum(0), net.lin(b["x"])[m == 2].mean(0)


def number_that_was_read(net, b):
    m = b["m"].clone()
    m[0] = int(m.sum())
    return net.lin(b["x"])[m > 16]


def of_a_buffer(net, b):
    return net.lin(b["x"]) * 2 if net.scale.item() > 1 else net.lin(b["x"])


def of_a_buffer_and_the_batch(net, b):
    y = net.lin(b["x"])
    return y if (b["m"] * (net.scale > 1).long()).all() else y + 1


def buffer_written_before_it_is_read(net, b):
    net.seen += 1
    return net.lin(b["x"]) if net.seen > 6 else net.lin(b["x"]) * 2


def buffer_written_after_it_is_read(net, b):
    y = net.lin(b["x"]) if net.seen % 2 == 0 else net.lin(b["x"]) * 2
    net.seen.add_(1)
    return y


def rows_of_a_buffer(net, b):
    return net.lin(b["x"])[:, net.chosen]


def of_a_weight(net, b):
    return net.lin(b["x"]) if (net.lin.bias > -100).all() else b["x"]


def greatest_number(net, b):
    x = b["x"]
    return net.lin(x / 255 if x.max() > 1.7 else x)


def range_of_numbers(net, b):
    x = b["x"].clamp(min=-1).abs()
    if x.amin() < 0.001 or not torch.isfinite(x).all():
        return net.lin(x)
    return net.lin(x) * 2 if torch.minimum(x[0], x[1]).amax() <= 1.9 else net.lin(x) * 3


def repeated(net, b):
    y = net.lin(b["x"])
    lengths = b["m"].sum(1)
    return y.repeat_interleave(lengths, dim=0), torch.repeat_interleave(lengths)


def classes_without_a_number(net, b):
    return torch.nn.functional.one_hot(b["m"].sum(1)) + net.lin(b["x"]).sum().long()


def counted_values(net, b):
    sums = b["m"].sum(1)
    counts = torch.bincount(sums), torch.bincount(sums.int(), minlength=9)
    return net.lin(b["x"]) * counts[0][-1], counts


def different_values(net, b):
    sums = b["m"].cumsum(1) % 3
    values, inverse, counts = torch.unique(sums, return_inverse=True, return_counts=True)
    y = [net.lin(b["x"])[sums == value].sum() for value in sums.int().unique()]
    return y, values, inverse, counts, torch.unique(sums, return_counts=True)


def different_values_in_a_row(net, b):
    sums = b["m"].sum(0)
    if len(torch.unique_consecutive(sums)) > 2:
        return net.lin(b["x"])
    return torch.unique_consecutive(sums, return_inverse=True, return_counts=True)


def arithmetic_of_floats(net, b):
    mask = (1.0 - b["m"].to(b["x"])) * torch.finfo(b["x"].dtype).min
    mask[b["m"] == 0] = -2.0
    mask.masked_fill_(mask > 1, 0.0)
    return net.lin(b["x"]) if (mask < -1).any().item() else net.lin(b["x"]) * 2


FULL = [
    *(repeated, classes_without_a_number, counted_values, different_values),
    *(different_values_in_a_row, arithmetic_of_floats),
    *(of_a_buffer, of_a_buffer_and_the_batch, buffer_written_before_it_is_read, of_a_weight),
    *(buffer_written_after_it_is_read, rows_of_a_buffer, greatest_number, range_of_numbers),
    *(set_numbers, set_by_lengths, set_twice_in_one_place, number_that_was_read),
    *(index_of_a_list, constants_in_a_read, set_by_a_list, mask_in_a_list),
    *(rows_of_a_mask, rows_that_are_not_zero, where_of_one_argument, selected_by_a_mask),
    *(put_by_a_mask, added_by_a_mask, mask_of_one_dimension, no_rows),
    *(mask_check, same_read_twice, number_of_reads_depends_on_values, loop_until_a_value),
    *(written_through_a_view, written_between_reads, value_in_tensor, equal_to_constant),
    *(slice_by_tensor, constant_read, check_that_raises, comparison_of_floats, value_in_output),
    *(changes_and_casts, in_a_submodule),
]
MODES = [pytest.param("FULL", marks=pytest.mark.exhaustive), "PIECEWISE", "FULL_AND_PIECEWISE"]


@pytest.mark.in_turn("context")
@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("step", FULL)
def test_steps_that_are_whole_graphs(step, context, backend, device):
    """Hazard 41."""
    call = run(step, backend, device, context=context)
    assert call.stats.steps["FULL"] > 12, call.summary()


@pytest.mark.in_turn("verify_replays")
@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("step", FULL)
def test_every_mode_gives_the_numbers_of_eager(step, mode, verify_replays, backend, device):
    run(step, backend, device, mode=mode, verify_replays=verify_replays)


def written_by_the_network(net, b):
    m = b["m"].float()
    m.copy_(net.lin(b["x"])[..., 0])
    return b["x"] if (m > 0).all() else -b["x"]


def alias_without_an_operation(net, b):
    m = b["m"].clone()
    m.data[0, 0] = net.lin(b["x"]).sum().long()
    return b["x"] if m.all() else -b["x"]


def of_the_network(net, b):
    return b["x"] if net.lin(b["x"]).sum() > 0 else -b["x"]


def of_randomness(net, b):
    return net.lin(b["x"]) if torch.rand((), device=b["x"].device) > 0.5 else b["x"]


def of_random_integers(net, b):
    n = torch.randint(0, 2, (3,), device=b["x"].device)
    return net.lin(b["x"]) if (n * b["m"][:, 0]).any() else b["x"]


def of_a_counter(net, b):
    net.seen += 1
    return net.lin(b["x"]) if int(net.seen) % 2 else net.lin(b["x"]) * 2


def greatest_number_as_a_value(net, b):
    x = b["x"].clamp(max=-0.0, min=0.0)
    return net.lin(b["x"]) + torch.stack([x, x.abs()]).amax(0)[0, 0, 0].item()


def greatest_number_in_another_tensor(net, b):
    x = b["x"].clone()
    x[0] = b["x"].clamp(max=0.0).amax()
    return net.lin(b["x"]) * x[0, 0, 0].item()


def sum_of_floats(net, b):
    return net.lin(b["x"]) if b["x"].sum() > 0 else -b["x"]


def set_to_another_storage(net, b):
    m = b["m"].clone()
    m.set_((net.lin(b["x"]) > 0)[..., 0].long())
    return b["x"] if m.all() else -b["x"]


def made_from_tensors(net, b):
    t = torch.tensor(net.lin(b["x"]).sum().detach() > 0)
    return b["x"] if t else -b["x"]


def tensors_in_a_list(net, b):
    first, last = net.lin(b["x"])[0, :2].argmax(-1) % 6
    return net.lin(b["x"]) if b["m"][:, [first, last]].all() else b["x"]


def tensors_of_the_batch_in_a_list(net, b):
    last = b["m"].sum(1) - 1
    return net.lin(b["x"])[[0, 1, 2], [last[0], last[1], last[2]]]


def set_to_a_tensor(net, b):
    m = b["m"].clone()
    m[0] = (net.lin(b["x"]).sum() > 0).long()
    return net.lin(b["x"])[m > 0]


def set_to_racing_values(net, b):
    m = b["m"].clone()
    m[b["m"][:, 0], b["m"][:, 1]] = torch.arange(3, device=m.device)
    return net.lin(b["x"])[m > 1]


def set_to_a_number_of_the_network(net, b):
    m = b["m"].clone()
    m[0] = int(net.lin(b["x"]).sum() > 0)
    return net.lin(b["x"])[m > 0]


def sizes_of_the_network(net, b):
    chosen = net.lin(b["x"]).argmax(-1)
    one_hot = torch.nn.functional.one_hot(chosen)
    return (
        one_hot,
        chosen.unique(),
        chosen[0].bincount(),
        chosen[0].repeat_interleave(chosen[1, :6]),
    )


def weighed_counts(net, b):
    return torch.bincount(b["m"].sum(1), weights=b["x"][:, 0, 0])


REFUSED = [
    *(sizes_of_the_network, weighed_counts),
    *(set_to_a_tensor, set_to_racing_values, set_to_a_number_of_the_network),
    *(tensors_in_a_list, tensors_of_the_batch_in_a_list),
    *(written_by_the_network, alias_without_an_operation, of_the_network, of_randomness),
    *(
        of_random_integers,
        of_a_counter,
        greatest_number_as_a_value,
        sum_of_floats,
        set_to_another_storage,
    ),
    *(made_from_tensors, caught_error, greatest_number_in_another_tensor),
]


@pytest.mark.in_turn("mode")
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("step", REFUSED)
def test_what_is_not_made_of_the_batch_is_no_graph(step, mode, backend, device):
    call = run(step, backend, device, mode=mode, verify_replays=0)
    assert call.stats.steps["FULL"] == 0, call.summary()


def test_values_that_vary_without_end_name_the_read(backend, device):
    def step(net, b):
        return net.lin(b["x"]) * b["n"].item()

    x = torch.randn(3, 6, 8, device=device)
    given = [{"x": x, "n": torch.tensor(index, device=device)} for index in range(60)]
    call = run(step, backend, device, given)
    assert call.stats.steps["PIECEWISE"] > 20, call.summary()
    reasons = [record.reason for record in call.stats.reasons if record.mode == "PIECEWISE"]
    assert str(reasons[0]).startswith("host sync: aten::item (")
    assert str(reasons[0]).endswith("), another value in each batch")
    assert "test_host_values.py" in reasons[0].location
    assert call.stats.captures == 1, call.summary()  # the submodule


def test_values_that_come_again_keep_their_graphs(backend, device):
    def step(net, b):
        return net.lin(b["x"]) * b["n"].item()

    x = torch.randn(3, 6, 8, device=device)
    numbers = [*range(4)] * 8 + [*range(100, 130)] + [*range(4)] * 8
    given = [{"x": x, "n": torch.tensor(n, device=device)} for n in numbers]
    call = run(step, backend, device, given)
    assert call.stats.steps["FULL"] > 45, call.summary()


def test_a_value_in_an_attribute_changes_the_reads(backend, device):
    def step(net, b):
        if net.flag:
            return net.lin(b["x"]) if b["m"].all() else -net.lin(b["x"])
        return net.lin(b["x"]) * b["m"][0].sum().item()

    def between(net, index):
        net.flag = index % 10 < 5

    call = run(step, backend, device, list(batches(device, 60)), between=between)
    assert call.stats.steps["FULL"] > 20, call.summary()


def _fill(net, index):
    net.scale.fill_(index // 6 % 2)


def _fill_data(net, index):
    net.scale.data.fill_(index // 6 % 2)


def _set(net, index):
    if index % 6 == 0:
        net.scale = torch.tensor(float(index // 6 % 2), device=net.scale.device)


def _load(net, index):
    scale = torch.tensor(float(index // 6 % 2))
    net.load_state_dict({**net.state_dict(), "scale": scale})


@pytest.mark.parametrize("between", [_fill, _fill_data, _set, _load])
@pytest.mark.parametrize("step", [of_a_buffer, of_a_buffer_and_the_batch])
def test_a_buffer_that_changes_between_steps(step, between, backend, device):
    """Hazard 41."""
    call = run(step, backend, device, between=between, given=list(batches(device, 48)))
    assert call.stats.steps["FULL"] > 12, call.summary()


def test_programs_that_fail_leave_the_error_to_the_step(backend, device):
    def step(net, b):
        rows = torch.arange(6, device=b["n"].device)[: int(b["n"][0])]
        last = rows.flip(0)[0] if b["n"][1] else rows.sum()
        return net.lin(b["x"]) * int(last)

    def given(a, c):
        x = torch.randn(3, 6, 8, device=device)
        return {"x": x, "n": torch.tensor([a, c], device=device)}

    call = run(step, backend, device, [given(3, 1), given(2, 0), given(0, 0)] * 8)
    assert call.stats.steps["FULL"] > 10, call.summary()
    net = Net(step).eval().to(device)
    with torch.inference_mode(), graphed(net, backend=backend) as call:
        for _ in range(6):
            call(given(3, 1))
        with pytest.raises(IndexError):
            call(given(0, 1))


def test_counts_of_negative_numbers_leave_the_error_to_the_step(backend, device):
    def step(net, b):
        try:
            return net.lin(b["x"]), torch.bincount(b["m"][:, 0])
        except RuntimeError:
            return net.lin(b["x"]) * 2

    given = [*batches(device), *batches(device)]
    for batch in given[20:40:3]:
        batch["m"][1, 0] = -1
    run(step, backend, device, given=given)


def test_a_wrong_answer_is_noticed_in_the_graph(backend, device):
    """The flag in the graph: the program is replaced by one that always holds."""
    net = Net(mask_check).eval().to(device)
    given = list(batches(device))
    with torch.inference_mode():
        call = graphed(net, backend=backend, verify_replays=0)
        for _ in range(5):
            call(given[0])
        state = next(iter(call._session.target.dispatcher._states.values()))
        state.variants[0].path._check = lambda leaves: None
        call(given[1])
        with pytest.raises(CUDAGraphError, match="another host value"):
            call.close()


def test_diagnosis_names_only_what_stands_in_the_way():
    batch = next(batches(torch.device("cpu")))
    assert diagnose(Net(mask_check), (batch,)).capturable()
    found = diagnose(Net(of_the_network), (batch,))
    assert [finding.operation for finding in found.findings] == ["aten::is_nonzero"]


def test_the_reason_names_the_read_that_nobody_can_answer(backend, device):
    def step(net, b):
        y = net.lin(b["x"]) * 2 if b["m"].all() else net.lin(b["x"])
        return y * y.mean().item()  # the reason

    call = run(step, backend, device)
    assert not call.stats.steps["FULL"]
    reasons = {r.reason.location for r in call.stats.reasons if r.mode == "PIECEWISE"}
    line = step.__code__.co_firstlineno + 2
    assert reasons == {f"{__file__}:{line}"}
    found = diagnose(Net(step), (next(batches(torch.device("cpu"))),))
    assert [finding.location for finding in found.findings] == [f"{__file__}:{line}"]


def test_reasons_of_new_values_name_the_read(backend, device):
    call = run(mask_check, backend, device)
    reasons = [record.reason for record in call.stats.reasons]
    changed = [str(reason) for reason in reasons if reason.kind is Status.CHANGED]
    assert "aten::is_nonzero" in changed[0]
    assert "now False, before True" in changed[0]


def test_batches_are_not_kept(backend, device):
    import weakref

    net = Net(mask_check).eval().to(device)
    given = list(batches(device, 8))
    kept = [weakref.ref(batch["m"]) for batch in given]
    with torch.inference_mode(), graphed(net, backend=backend) as call:
        while given:
            call(given.pop(0))
        assert [ref() for ref in kept] == [None] * 8
        assert isinstance(call(next(batches(device))), Tensor)
