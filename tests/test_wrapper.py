import copy
import doctest
import logging
import pickle

import pytest
import torch
from torch import nn

from cg_lightning import (
    BatchDescriptor,
    CaptureError,
    CUDAGraphEntry,
    CUDAGraphError,
    CUDAGraphMode,
    CUDAGraphOptions,
    CUDAGraphWrapper,
    ForwardContext,
    compilation_counter,
    override_forward_context,
    set_cudagraph_capturing_enabled,
    set_forward_context,
    validate_cudagraph_capturing_enabled,
)
from cg_lightning.core.forward_context import StepInProgress

NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL
KEY = BatchDescriptor(batch_size=4)


class Double(nn.Module):
    """Doubles, and counts how often Python ran it."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, **extra):
        self.calls += 1
        return x * self.scale


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def net(device):
    return Double().to(device)


@pytest.fixture
def x(device):
    return torch.arange(4.0, device=device)


def wrap(net, backend, mode=FULL, **options):
    return CUDAGraphWrapper(net, mode, CUDAGraphOptions(**options), backend=backend)


@pytest.mark.parametrize("mode", [PIECEWISE, FULL])
def test_captures_a_new_key_and_replays_a_known_one(net, x, backend, mode):
    wrapper = wrap(net, backend, mode)
    before = compilation_counter.num_cudagraph_captured
    outputs = []
    with set_forward_context(mode, KEY):
        for step in range(4):
            x.fill_(step + 1)
            outputs.append(wrapper(x).clone())
    assert [output[0].item() for output in outputs] == [
        2,
        4,
        6,
        8,
    ]  # hazard 16: the first is a real value as well
    assert net.calls == 1
    assert compilation_counter.num_cudagraph_captured == before + 1
    (entry,) = wrapper.concrete_cudagraph_entries.values()
    assert isinstance(entry, CUDAGraphEntry)
    assert entry.batch_descriptor == KEY
    assert entry.input_addresses == [x.data_ptr()]
    entry.cudagraph.replay()
    assert entry.output.tolist() == [8, 8, 8, 8]


@pytest.mark.parametrize(
    "context", [None, ForwardContext(NONE, KEY), ForwardContext(PIECEWISE, KEY), ForwardContext()]
)
def test_bypasses_without_context_in_none_and_in_another_mode(net, x, backend, context):
    wrapper = wrap(net, backend)
    with override_forward_context(context):
        assert wrapper(x).tolist() == [0, 2, 4, 6]
        assert wrapper(x=x).tolist() == [0, 2, 4, 6]
    assert net.calls == 2
    assert wrapper.concrete_cudagraph_entries == {}


def test_one_entry_per_key_in_any_order(net, device, backend):
    """Hazard 2: graphs of one pool replayed in turn."""
    wrapper = wrap(net, backend)
    statics = {size: torch.empty(size, device=device) for size in (2, 3, 4)}
    kept = []
    for step, size in enumerate([2, 4, 3, 2, 4, 2, 3, 3, 4]):
        static = statics[size].fill_(step)
        with set_forward_context(FULL, BatchDescriptor(batch_size=size)):
            kept.append(wrapper(static).clone())
    assert [k.shape[0] for k in kept] == [2, 4, 3, 2, 4, 2, 3, 3, 4]
    assert [k[0].item() for k in kept] == [2.0 * step for step in range(9)]
    assert len(wrapper.concrete_cudagraph_entries) == 3
    assert net.calls == 3


def test_full_around_piecewise(x, backend, device):
    """Nested wrappers: each runs in its own mode, and an inner one ignores a running capture."""
    inner_net, head = Double().to(device), Double().to(device)
    inner = wrap(inner_net, backend, PIECEWISE)
    outer = wrap(lambda x: head(inner(x)), backend, FULL)
    for mode in (PIECEWISE, FULL, PIECEWISE, FULL, NONE):
        with set_forward_context(mode, KEY):
            assert outer(x).tolist() == [0, 4, 8, 12]
    assert len(inner.concrete_cudagraph_entries) == len(outer.concrete_cudagraph_entries) == 1
    assert inner_net.calls == 3  # one capture of each, and NONE
    assert head.calls == 4


def test_calls_of_one_step_have_entries_of_their_own(net, device, backend):
    """Hazard 31."""
    wrapper = wrap(net, backend, weak_ref_output=False)
    a, b = torch.ones(2, device=device), torch.full((2,), 5.0, device=device)
    for step in range(3):
        a.fill_(step)
        with override_forward_context(ForwardContext(FULL, KEY, step=StepInProgress())):
            first, second = wrapper(a), wrapper(b)
            assert (first[0].item(), second[0].item()) == (2 * step, 10)
    assert [key.call for key in wrapper.concrete_cudagraph_entries] == [0, 1]


def test_by_hand_a_second_call_replays(net, x, backend):
    wrapper = wrap(net, backend)
    with set_forward_context(FULL, KEY):
        wrapper(x)
        wrapper(x)
    assert net.calls == 1
    assert len(wrapper.concrete_cudagraph_entries) == 1


def test_other_tensors_give_a_stale_result_unless_addresses_are_checked(net, x, backend):
    """Issue 17: documented, with an example that runs."""
    silent, checking = wrap(net, backend), wrap(net, backend, check_addresses=True)
    with set_forward_context(FULL, KEY):
        first = silent(x).clone()
        assert torch.equal(silent(x + 1), first)
        assert torch.equal(silent(x.copy_(x + 1)), first + 2)
        checking(x)
        with pytest.raises(CUDAGraphError, match=r"captured\.copy_\(new\)"):
            checking(x + 1)


def test_the_example_of_the_docstring_runs():
    (example,) = doctest.DocTestFinder(recurse=False).find(CUDAGraphWrapper, "CUDAGraphWrapper")
    with torch.enable_grad():
        results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example)
    assert results.attempted == 8
    assert results.failed == 0


def test_address_check_names_the_leaf(net, x, backend, device):
    wrapper = wrap(net, backend, check_addresses=True)
    mask = torch.ones(1, device=device)
    with set_forward_context(FULL, KEY):
        wrapper(x, extra={"mask": [mask]})
        wrapper(x, extra={"mask": [mask]})
        with pytest.raises(CUDAGraphError, match=r"args\[0\].*expected"):
            wrapper(x.clone(), extra={"mask": [mask]})
        moved = mask.clone()
        with pytest.raises(CUDAGraphError) as caught:
            wrapper(x, extra={"mask": [moved]})
        with pytest.raises(CUDAGraphError, match="2 input tensors, called with 1"):
            wrapper(x)
    for part in ("kwargs['extra']['mask'][0]", hex(moved.data_ptr()), hex(mask.data_ptr())):
        assert part in str(caught.value)


def test_address_check_follows_the_log_level(net, x, backend, caplog):
    wrapper = wrap(net, backend)
    with set_forward_context(FULL, KEY):
        wrapper(x)
        wrapper(x.clone())
        with caplog.at_level(logging.DEBUG, logger="cg_lightning"), pytest.raises(CUDAGraphError):
            wrapper(x.clone())


@pytest.mark.parametrize("enabled", [True, False])
def test_debug_log_enable(net, x, backend, caplog, enabled):
    wrapper = wrap(net, backend, debug_log_enable=enabled)
    with caplog.at_level(logging.DEBUG, logger="cg_lightning"), set_forward_context(FULL, KEY):
        wrapper(x)
    assert ("Capturing a CUDA graph on (FULL" in caplog.text) is enabled


@pytest.mark.parametrize("disable", [True, False])
def test_gc_disable_means_no_collection_before_a_capture(net, x, backend, disable):
    import gc

    collections = []
    gc.callbacks.append(
        lambda phase, info: collections.append(info["generation"]) if phase == "start" else None
    )
    try:
        with set_forward_context(FULL, KEY):
            wrap(net, backend, gc_disable=disable)(x)
    finally:
        gc.callbacks.pop()
    assert (2 in collections) is not disable


def test_attributes_fall_through(net, backend):
    wrapper = wrap(net, backend)
    assert wrapper.scale is net.scale
    assert wrapper.unwrap() is net
    with pytest.raises(AttributeError) as caught:
        _ = wrapper.nothing
    assert "CUDAGraphWrapper" in str(caught.value)
    assert "Double" in str(caught.value)


def test_copies_run_their_own_weights(net, x, backend):
    wrapper = wrap(net, backend)
    with set_forward_context(FULL, KEY):
        wrapper(x)
        for other in (copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
            assert other.concrete_cudagraph_entries == {}
            other.unwrap().scale.fill_(10)
            assert other(x).tolist() == [0, 10, 20, 30]
        assert wrapper(x).tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("mode", [NONE, CUDAGraphMode.FULL_AND_PIECEWISE])
def test_its_own_mode_is_piecewise_or_full(net, backend, mode):
    with pytest.raises(ValueError, match=f"PIECEWISE or FULL, not {mode.name}"):
        CUDAGraphWrapper(net, mode, backend=backend)


def test_unknown_settings_list_the_choices(net):
    with pytest.raises(ValueError, match="auto, cuda, recorder"):
        CUDAGraphWrapper(net, FULL, backend="rocm")
    with pytest.raises(ValueError, match="global, thread_local, relaxed"):
        CUDAGraphOptions(capture_error_mode="loud")


def test_a_mode_without_a_key_is_an_error(net, x, backend):
    with set_forward_context(FULL), pytest.raises(CUDAGraphError, match="no batch_descriptor"):
        wrap(net, backend)(x)


def test_the_gate(net, x, backend):
    wrapper = wrap(net, backend)
    with set_forward_context(FULL, KEY):
        set_cudagraph_capturing_enabled(False)
        try:
            with pytest.raises(CUDAGraphError, match="set_cudagraph_capturing_enabled"):
                wrapper(x)
            with pytest.raises(CUDAGraphError):
                validate_cudagraph_capturing_enabled()
        finally:
            set_cudagraph_capturing_enabled(True)
        validate_cudagraph_capturing_enabled()
        assert wrapper.concrete_cudagraph_entries == {}
        wrapper(x)
        set_cudagraph_capturing_enabled(False)
        try:
            assert wrapper(x).tolist() == [0, 2, 4, 6]  # a replay is no capture
        finally:
            set_cudagraph_capturing_enabled(True)


def test_a_failed_capture_leaves_no_entry_and_a_working_backend(x, backend, device):
    """Hazards 17 and 30."""

    def step(x):
        return x * x.sum().item()

    wrapper = CUDAGraphWrapper(step, FULL, backend=backend)
    with set_forward_context(FULL, KEY):
        with pytest.raises(CaptureError) as caught:
            wrapper(x)
        assert caught.value.__cause__ is not None
        assert wrapper.concrete_cudagraph_entries == {}
        assert torch.randn(3, device=device).shape == (3,)
        assert wrap(Double().to(device), backend)(x).tolist() == [0, 2, 4, 6]


def test_a_pool_outlives_its_graphs(x, backend, device):
    """Hazard 33."""
    for _ in range(3):
        wrapper = wrap(Double().to(device), backend)
        with set_forward_context(FULL, KEY):
            assert wrapper(x).tolist() == [0, 2, 4, 6]
        wrapper.concrete_cudagraph_entries.clear()
        del wrapper


@pytest.mark.parametrize("made_in", [torch.no_grad, torch.inference_mode])
def test_random_numbers_go_on(device, backend, made_in):
    """Hazard 9: replays draw new numbers, the ones that eager would draw."""
    x = torch.ones(64, device=device)
    torch.manual_seed(3)
    eager = [nn.functional.dropout(x) for _ in range(4)] + [torch.rand(1, device=device)]
    torch.manual_seed(3)
    wrapper = CUDAGraphWrapper(nn.functional.dropout, FULL, backend=backend)
    with made_in(), set_forward_context(FULL, KEY):
        graphed = [wrapper(x).clone() for _ in range(4)] + [torch.rand(1, device=device)]
    for one, other in zip(graphed, eager, strict=True):
        assert torch.equal(one, other)


def test_without_cuda_auto_calls_the_runnable(x):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    net = Double()
    wrapper = CUDAGraphWrapper(net, FULL)
    with set_forward_context(FULL, KEY):
        assert wrapper(torch.ones(1)).item() == 2
        wrapper(torch.ones(1))
    assert net.calls == 2


def test_autocast_casts_weights_in_every_replay(device, backend):
    """Hazard 5: a cast copy from before the capture would go stale."""
    net = nn.Linear(4, 4).to(device)
    x = torch.randn(2, 4, device=device)
    wrapper = CUDAGraphWrapper(net, FULL, backend=backend)
    with torch.autocast(device.type, torch.bfloat16), set_forward_context(FULL, KEY):
        net(x)  # fills the cache
        wrapper(x)
        for _ in range(2):
            net.weight.add_(1)
            torch.clear_autocast_cache()
            assert torch.equal(wrapper(x), net(x))
