import pytest

from cg_lightning import BatchDescriptor, CUDAGraphDispatcher, CUDAGraphMode

KEY, OTHER = BatchDescriptor(batch_size=1), BatchDescriptor(batch_size=2)


def test_prefers_full_to_piecewise_to_none():
    dispatcher = CUDAGraphDispatcher()
    assert dispatcher.dispatch(KEY) == (CUDAGraphMode.NONE, KEY, "unknown key")
    dispatcher.add_cudagraph_key(CUDAGraphMode.PIECEWISE, KEY, "a sync")
    assert dispatcher.dispatch(KEY) == (CUDAGraphMode.PIECEWISE, KEY, "a sync")
    dispatcher.add_cudagraph_key(CUDAGraphMode.FULL, KEY)
    result = dispatcher.dispatch(KEY)
    assert (result.runtime_mode, result.batch_descriptor, result.reason) == (
        CUDAGraphMode.FULL,
        KEY,
        "",
    )
    assert dispatcher.dispatch(OTHER).runtime_mode is CUDAGraphMode.NONE


def test_a_refused_key_runs_lower_with_its_reason():
    dispatcher = CUDAGraphDispatcher()
    dispatcher.add_cudagraph_key(CUDAGraphMode.FULL, KEY)
    dispatcher.add_cudagraph_key(CUDAGraphMode.PIECEWISE, KEY)
    dispatcher.refuse(CUDAGraphMode.FULL, KEY, "the capture failed")
    assert dispatcher.dispatch(KEY) == (CUDAGraphMode.PIECEWISE, KEY, "the capture failed")
    dispatcher.clear()
    assert dispatcher.dispatch(KEY).reason == "unknown key"


@pytest.mark.parametrize("mode", [CUDAGraphMode.NONE, CUDAGraphMode.FULL_AND_PIECEWISE])
def test_keys_are_of_runtime_modes(mode):
    with pytest.raises(ValueError, match="PIECEWISE or FULL"):
        CUDAGraphDispatcher().add_cudagraph_key(mode, KEY)
