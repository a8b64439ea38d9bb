"""Gradients of graphs: their memory is written again only if nobody can see it."""

import copy
import weakref

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from cg_lightning.backends.recorder import RecorderBackend
from cg_lightning.capture.outputs import GroupedCopies
from cg_lightning.trainer import gradient_copies
from cg_lightning.trainer.gradient_copies import GradientCopies
from tests.harness import assert_same
from tests.test_training import Classifier, points, replayed

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning", "ignore:.*deterministic"
)


class Looks(Callback):
    """Looks at the gradients of each iteration, in one way."""

    def __init__(self, look=lambda *_: None):
        self.look = look
        self.kept = []
        self.sums = []
        self.weights = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [p.grad for p in pl_module.parameters()]
        self.sums.append([gradient.double().sum() for gradient in gradients])
        self.kept.append([self.look(gradient) for gradient in gradients])

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append([t.detach().clone() for t in pl_module.state_dict().values()])


def train(harness, module, looks, callbacks=(), **settings):
    torch.manual_seed(1)
    trainer = harness.trainer(*callbacks, looks, max_epochs=2, **settings)
    trainer.fit(module, points())
    return looks.kept, looks.sums, looks.weights, [p.grad for p in module.parameters()]


def compare(harness, make_look, module=None, **settings):
    """Train with and without the callback."""
    module = module or Classifier()
    callback = harness.callback(stages=["train"])
    reference = train(harness, copy.deepcopy(module), Looks(make_look()), **settings)
    ours = train(harness, module, Looks(make_look()), [callback], **settings)
    assert_same(ours, reference)
    assert replayed(callback) > 8, callback.stats


@pytest.fixture
def reused(monkeypatch):
    """One item for each iteration that has written to the gradients of an earlier one."""
    calls, write_to = [], GroupedCopies.write_to

    def counted(self, copies):
        calls.append(len(copies))
        write_to(self, copies)

    monkeypatch.setattr(GroupedCopies, "write_to", counted)
    return calls


def nothing():
    return lambda gradient: None


def itself():
    return lambda gradient: gradient


def in_views():
    return lambda gradient: gradient.view(-1)[:1]


def detached():
    return lambda gradient: gradient.detach()


def storages():
    kept = []

    def look(gradient):
        kept.append((gradient.untyped_storage(), gradient.clone()))
        for storage, value in kept:  # in eager, the memory of an earlier iteration stays
            now = torch.empty(0, device=value.device).set_(storage, 0, value.shape, value.stride())
            assert torch.equal(now, value)

    return look


def saved_for_backward():
    weight = torch.ones((), requires_grad=True)

    def look(gradient):
        with torch.enable_grad():
            return (weight.to(gradient.device) * gradient).sum()

    return look


def weakly():
    kept = []

    def look(gradient):
        kept.append(weakref.ref(gradient))
        return sum(each() is not None for each in kept)

    return look


def with_attribute():
    def look(gradient):
        is_marked = hasattr(gradient, "mark")
        gradient.mark = True
        return is_marked

    return look


def transposed():
    def look(gradient):
        shape = tuple(gradient.shape)
        if gradient.dim() == 2 and shape[0] == shape[1]:
            gradient.t_()
        return shape, gradient.stride()

    return look


def asked_for_gradients():
    def look(gradient):
        before = gradient.requires_grad
        gradient.requires_grad_()
        return before

    return look


def counting_changes():
    def look(gradient):
        before = gradient._version
        gradient.mul_(2)
        return before

    return look


def elsewhere():
    def look(gradient):
        gradient.data = gradient.data.clone()

    return look


HELD = [itself, in_views, detached, storages, saved_for_backward]
CHANGED = [weakly, with_attribute, transposed, asked_for_gradients, counting_changes, elsewhere]


@pytest.mark.parametrize("look", HELD)
def test_gradients_that_somebody_holds_keep_their_values(harness, look, reused):
    """Hazard 1: all of them are compared at the end, when later replays have run."""
    compare(harness, look)
    assert not reused


@pytest.mark.parametrize("look", CHANGED)
def test_gradients_are_as_new_ones_in_each_iteration(harness, look):
    compare(harness, look, nn_square())


def nn_square():
    return Classifier(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)))


def test_gradients_that_nobody_holds_have_the_memory_of_earlier_ones(harness, reused):
    compare(harness, nothing)
    assert len(reused) > 8


def test_without_counts_of_references_each_gradient_is_new(harness, monkeypatch, reused):
    monkeypatch.setattr(gradient_copies, "_of_tensor", None)
    compare(harness, nothing)
    assert not reused


@pytest.mark.parametrize("number", [2, 3])
def test_accumulated_gradients(harness, number):
    compare(harness, nothing, accumulate_grad_batches=number)


class KeepsZeroes(Classifier):
    """Gradients stay between two iterations, and are zero."""

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


def test_gradients_that_are_set_to_zero_are_added_to(harness):
    compare(harness, itself, KeepsZeroes())


class _GivesViews(torch.autograd.Function):
    @staticmethod
    def forward(ctx, first, second):
        return first + second.view(4)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        return gradient.view(4), gradient.view(2, 2)


class GradientsShareMemory(Classifier):
    """The gradients of two weights have the same memory."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2, 2))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + (_GivesViews.apply(self.first, self.second) ** 2).sum() * loss.detach()

    def on_before_optimizer_step(self, optimizer):
        assert self.first.grad.data_ptr() == self.second.grad.data_ptr()


def test_gradients_that_share_memory_still_do(harness):
    """Clipping writes to each of them."""
    module, callback = GradientsShareMemory(), harness.callback(stages=["train"])
    settings = {"gradient_clip_val": 0.01}
    reference = train(harness, copy.deepcopy(module), Looks(nothing()), **settings)
    assert_same(train(harness, module, Looks(nothing()), [callback], **settings), reference)
    assert replayed(callback) > 8, callback.stats


def test_after_training_no_class_of_torch_has_a_function_of_ours(harness):
    classes = torch.Tensor, torch.UntypedStorage
    before = [dict(vars(each)) for each in classes]
    compare(harness, nothing)
    assert [dict(vars(each)) for each in classes] == before


class Validates(Classifier):
    """Validates after each iteration, and notes the function that its tensors have then."""

    def __init__(self):
        super().__init__()
        self.functions = []

    def on_validation_start(self):
        self.functions.append(vars(torch.Tensor).get("record_stream"))


def test_validations_do_not_change_the_class_of_tensors(harness):
    """Python forgets what it has cached of a class, and at last caches it no more."""
    callback, module = harness.callback(stages=["train", "validate"]), Validates()
    trainer = harness.trainer(callback, val_check_interval=1, max_epochs=1)
    trainer.fit(module, points(), points())
    functions = set(module.functions[1:])  # without the one before training
    assert len(module.functions) > 8
    assert len(functions) == 1
    assert None not in functions
    assert "record_stream" not in vars(torch.Tensor)


def record_a_stream(tensor):
    with pytest.raises(RuntimeError):  # tensors of the host have no streams
        tensor.record_stream(None)


def send_to_a_process(tensor):
    """What a queue of ``torch.multiprocessing`` does with a tensor of a GPU."""
    with pytest.raises((RuntimeError, AttributeError)):
        tensor._typed_storage()._share_cuda_()


@pytest.mark.parametrize("use", [record_a_stream, send_to_a_process])
def test_another_user_ends_the_use_of_the_memory(use):
    copies = GradientCopies(RecorderBackend(torch.device("cpu")))
    copies.install()
    try:
        gradients = [torch.ones(2, 3), torch.ones(3)]
        first = [id(each) for each in copies.make(gradients)]
        assert [id(each) for each in copies.make(gradients)] == first
        part = copies.make(gradients)[0].view(-1)
        use(part)
        del part
        assert not copies._copies
    finally:
        copies.remove()


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided, torch.sparse_coo])
def test_tensors_of_other_kinds_may_record_streams(layout):
    """Their memory may be inside other tensors, so PyTorch refuses to return an address."""
    copies = GradientCopies(RecorderBackend(torch.device("cpu")))
    batch = torch.eye(3).to_sparse()
    if layout is not torch.sparse_coo:
        parts = [torch.ones(2), torch.ones(3)]
        batch = torch.nested.nested_tensor(parts, layout=layout)
    message = _error_of(batch)
    copies.install()
    try:
        copies.make([torch.ones(2, 3), torch.ones(3)])
        assert _error_of(batch) == message
    finally:
        copies.remove()


def _error_of(tensor):
    with pytest.raises((RuntimeError, NotImplementedError)) as error:
        tensor.record_stream(torch.Stream("cpu"))
    return str(error.value)


@pytest.mark.gpu
def test_a_stream_that_reads_gradients_later(harness):
    """Hazard 13: in eager, ``record_stream`` keeps the memory until it was read."""
    if harness.backend != "cuda":
        pytest.skip("the CPU has no streams")
    side = torch.cuda.Stream()

    def later():
        def look(gradient):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                torch.cuda._sleep(4_000_000)
                found = gradient.double().sum()
            gradient.record_stream(side)
            return found

        return look

    compare(harness, later)
    torch.cuda.synchronize()
