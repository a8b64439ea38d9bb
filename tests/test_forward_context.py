import contextlib
import threading

import pytest

from cg_lightning import (
    BatchDescriptor,
    CUDAGraphMode,
    ForwardContext,
    get_forward_context,
    is_forward_context_available,
    override_forward_context,
    set_forward_context,
)
from cg_lightning.core.forward_context import StepInProgress


def test_none_is_set():
    assert not is_forward_context_available()
    with pytest.raises(RuntimeError, match=r"^No forward context is set"):
        get_forward_context()


def test_nests_and_restores_after_an_exception():
    key = BatchDescriptor(batch_size=2)
    with set_forward_context(CUDAGraphMode.FULL, key) as outer:
        assert get_forward_context() is outer
        with contextlib.suppress(KeyError), set_forward_context() as inner:
            assert get_forward_context() is inner
            assert inner.cudagraph_runtime_mode is CUDAGraphMode.NONE
            raise KeyError
        assert get_forward_context().batch_descriptor is key
        with override_forward_context(None):
            assert not is_forward_context_available()
        assert get_forward_context() is outer
    assert not is_forward_context_available()


@pytest.mark.parametrize("mode", [CUDAGraphMode.FULL_AND_PIECEWISE, "FULL", None])
def test_what_is_no_runtime_mode_is_refused(mode):
    with pytest.raises(ValueError, match="NONE, PIECEWISE or FULL"), set_forward_context(mode):
        raise AssertionError("entered")
    assert not is_forward_context_available()


def test_each_thread_has_its_own():
    seen = {}

    def look(name):
        seen[name] = is_forward_context_available()
        with set_forward_context(CUDAGraphMode.PIECEWISE, BatchDescriptor(batch_size=name)):
            barrier.wait()
            seen[name, "own"] = get_forward_context().batch_descriptor.batch_size

    barrier = threading.Barrier(3)
    with set_forward_context(CUDAGraphMode.FULL, BatchDescriptor()):
        threads = [threading.Thread(target=look, args=(n,)) for n in (1, 2)]
        for thread in threads:
            thread.start()
        barrier.wait()
        for thread in threads:
            thread.join()
        assert get_forward_context().cudagraph_runtime_mode is CUDAGraphMode.FULL
    assert seen == {1: False, 2: False, (1, "own"): 1, (2, "own"): 2}


def test_calls_are_numbered_within_a_step_only():
    step = ForwardContext(step=StepInProgress())
    caller = object()
    assert [step.next_call(caller), step.next_call(caller), step.next_call(object())] == [0, 1, 0]
    by_hand = ForwardContext()
    assert [by_hand.next_call(caller), by_hand.next_call(caller)] == [0, 0]
