"""The recorder refuses whatever a GPU would refuse."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cg_lightning import CaptureError, IllegalOperationError
from cg_lightning.backends import RecorderBackend
from tests.models import Attention, Recurrent

CPU = torch.device("cpu")


def capture(function):
    return RecorderBackend(CPU).capture(
        function, collect_garbage=False, capture_error_mode="thread_local"
    )


def modules():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    return {
        "conv": (
            nn.Sequential(
                nn.Conv2d(1, 4, 3),
                nn.BatchNorm2d(4),
                nn.ReLU(inplace=True),
                nn.Conv2d(4, 4, 3),
                nn.ReLU(True),
            ),
            (2, 1, 8, 8),
        ),
        "lstm": (Recurrent(nn.LSTM), (2, 5, 8)),
        "gru": (Recurrent(nn.GRU), (2, 5, 8)),
        "encoder": (encoder, (2, 5, 8)),
        "attention": (Attention(), (2, 5, 8)),
        "sdpa": (Sdpa(), (2, 3, 5, 8)),
        "einsum": (Einsum(), (2, 5, 8)),
        "embedding": (Embed(), (2, 5)),
    }


class Sdpa(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x * 2, x + 1, is_causal=True)


class Einsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3))

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            y = torch.einsum("btf,fo->bto", x.float(), self.weight)
        return torch.einsum("bto,fo->btf", y, self.weight)


class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)

    def forward(self, x):
        return self.embedding(x.abs().mul(3).long().remainder(10))


def skip_where_eager_fails(eager, autocast):
    """Some CPUs have no bfloat16 for some layers (oneDNN's LSTM), which is not our failure."""
    try:
        eager()
    except RuntimeError as error:
        if not autocast:
            raise
        pytest.skip(f"eager PyTorch itself has no bfloat16 for this layer on this CPU: {error}")


def test_that_only_a_failure_of_eager_in_bfloat16_is_skipped():
    def fails():
        raise RuntimeError("could not create a primitive")

    with pytest.raises(pytest.skip.Exception, match="eager PyTorch itself"):
        skip_where_eager_fails(fails, True)
    with pytest.raises(RuntimeError, match="primitive"):
        skip_where_eager_fails(fails, False)
    skip_where_eager_fails(lambda: None, True)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", list(modules()))
def test_replays_equal_eager(name, mode, autocast):
    torch.manual_seed(0)
    net, shape = modules()[name]
    net.eval()
    reference = copy.deepcopy(net)
    static = torch.randn(shape)
    with mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        skip_where_eager_fails(lambda: reference(static.clone()), autocast)
        graph, output = capture(lambda: net(static))
        for _ in range(3):
            static.copy_(torch.randn(shape))
            expected = reference(static.clone())
            graph.replay()
            assert output.dtype == expected.dtype
            assert torch.equal(output, expected)


def test_batch_norm_in_training_updates_its_statistics_once_a_replay():
    net = nn.BatchNorm1d(3)
    reference = copy.deepcopy(net)
    static = torch.randn(4, 3)
    with torch.no_grad():
        graph, output = capture(lambda: net(static))
        assert torch.equal(net.running_mean, reference.running_mean)  # a capture runs nothing
        for _ in range(3):
            static.copy_(torch.randn(4, 3))
            graph.replay()
            assert torch.equal(output, reference(static.clone()))
    assert torch.equal(net.running_var, reference.running_var)
    assert net.num_batches_tracked == 3


def test_capture_changes_no_byte_and_poisons_what_it_returns():
    x = torch.ones(3)
    numbers = torch.arange(3)
    state = torch.zeros(3)

    def step():
        state.add_(1)
        x.mul_(5)
        return x + state, numbers + 1, x > 0

    with torch.no_grad():
        graph, (total, index, flag) = capture(step)
        assert x.tolist() == [1, 1, 1]
        assert state.tolist() == [0, 0, 0]
        assert total.isnan().all()
        assert index.tolist() == [torch.iinfo(torch.int64).max] * 3
        graph.replay()
        assert (total.tolist(), index.tolist(), flag.tolist()) == ([6, 6, 6], [1, 2, 3], [True] * 3)


def test_random_state_is_not_used_up_by_a_capture():
    before = torch.get_rng_state()
    capture(lambda: torch.rand(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_reads_the_captured_address_not_the_tensor_that_took_its_place():
    """Hazard 4: a GPU reads the old memory as well."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.ones_(net.weight)
    static = torch.ones(1, 1)
    with torch.no_grad():
        graph, output = capture(lambda: net(static))
        net.weight.data = torch.full((1, 1), 7.0)
        graph.replay()
        assert output.item() == 1


def test_a_replay_poisons_what_others_hold_weakly():
    """Hazard 2."""
    backend = RecorderBackend(CPU)
    x = torch.ones(2)

    def record(weak):
        def step():
            return backend.weak_ref_tensor(x * 2) if weak else x * 2

        return backend.capture(step, collect_garbage=False, capture_error_mode="thread_local")

    with torch.no_grad():
        (one, weak), (two, strong), (three, _) = record(True), record(False), record(True)
        one.replay()
        two.replay()
        assert weak.isnan().all()
        one.replay()
        three.replay()
        assert weak.isnan().all()
        assert strong.tolist() == [2, 2]


SYNCS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "float": lambda x: float(x[0]),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "print": lambda x: print(x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "assign by mask": lambda x: x.index_put_((x > 0,), torch.arange(2.0)),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.long().bincount(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "inverse": lambda x: torch.linalg.inv(x[:1, None]),
    "from Python": lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    "equal": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", list(SYNCS))
def test_raises_where_cuda_would(name, mode):
    x = torch.tensor([1.0, 0.0, 1.0])
    with mode(), pytest.raises(CaptureError) as caught:
        capture(lambda: SYNCS[name](x))
    assert isinstance(caught.value.__cause__, IllegalOperationError)
    assert "cannot be captured" in str(caught.value)
    assert x.tolist() == [1, 0, 1]
    assert x.cpu() is x


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_legal_relatives_are_captured(mode):
    x = torch.tensor([1.0, 0.0, 1.0])

    def step():
        filled = x.clone().masked_fill_(x > 0, 5)
        filled[x > 0] = 6.0
        return torch.where(x > 0, x, filled), x.repeat_interleave(2), x.argmax(), x[torch.arange(2)]

    with mode():
        graph, outputs = capture(step)
        graph.replay()
        assert [output.tolist() for output in outputs] == [[1, 0, 1], [1, 1, 0, 0, 1, 1], 0, [1, 0]]


def test_other_threads_read_tensors_meanwhile():
    """Hazard 18."""
    seen = []
    x = torch.ones(2)

    def step():
        thread = threading.Thread(target=lambda: seen.append(x.tolist()))
        thread.start()
        thread.join()
        return x * 2

    capture(step)
    assert seen == [[1, 1]]


def test_an_exception_undoes_what_ran_before_it():
    x = torch.zeros(2)

    def step():
        x.add_(1)
        raise KeyError("mine")

    with pytest.raises(CaptureError, match="KeyError") as caught:
        capture(step)
    assert isinstance(caught.value.__cause__, KeyError)
    assert x.tolist() == [0, 0]


def test_a_tensor_given_twice_stays_one():
    """Attention of a sequence to itself takes another kernel, with other last bits on some CPUs."""
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(4, 5, 8)
    with torch.inference_mode():
        graph, _ = RecorderBackend(torch.device("cpu")).capture(
            lambda: attention(x, x, x), collect_garbage=False, capture_error_mode="thread_local"
        )
    query, key, value = graph._operations[0].args[:3]
    assert query is key is value
