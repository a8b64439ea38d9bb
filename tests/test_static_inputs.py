import pytest
import torch

from cg_lightning import UnkeyableBatchError
from cg_lightning.capture.static_inputs import StaticInputs


def make(device, *tensors):
    return StaticInputs(list(tensors), tuple(tensors), device)


@pytest.mark.parametrize("made_in", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("written_in", [torch.no_grad, torch.inference_mode])
def test_can_be_written_under_no_grad_and_inference_mode(device, made_in, written_in):
    with made_in():
        inputs = make(device, torch.zeros(3, device=device))
    with written_in():
        inputs.copy_from([torch.ones(3, device=device)])
    assert inputs.leaves[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x, id="contiguous"),
        pytest.param(lambda x: x.t(), id="transposed"),
        pytest.param(lambda x: x[:, ::2], id="with gaps"),
        pytest.param(lambda x: x[:1].expand(4, 6), id="expanded"),
        pytest.param(lambda x: x[0, 0].expand(2, 3), id="expanded scalar"),
        pytest.param(lambda x: x.to(torch.bfloat16), id="bfloat16"),
    ],
)
def test_keeps_shape_strides_dtype_and_values(device, view):
    first, second = (view(torch.randn(4, 6, device=device)) for _ in range(2))
    number = torch.arange(3, device=device)
    inputs = make(device, first, number)
    address = inputs.leaves[0].data_ptr()
    for values in (first, second):
        inputs.copy_from([values, number])
        static = inputs.leaves[0]
        assert (static.shape, static.stride(), static.dtype) == (
            values.shape,
            values.stride(),
            values.dtype,
        )
        assert torch.equal(static, values)
        assert static.data_ptr() == address


def test_a_tensor_that_already_lies_there_is_not_copied(device):
    inputs = make(device, torch.zeros(3, device=device))
    inputs.leaves[0].fill_(7)
    version = inputs.leaves[0]._version
    inputs.copy_from([inputs.leaves[0]])
    assert inputs.leaves[0]._version == version


def test_tensors_of_several_data_types_are_copied(device):
    """Each grouped copy takes tensors of one data type, in any order of the leaves."""
    dtypes = (torch.float32, torch.int64, torch.float32, torch.bool, torch.int64, torch.float16)
    batches = [
        [torch.randint(0, 2, (3, 2), device=device).to(dtype) for dtype in dtypes] for _ in range(3)
    ]
    inputs = StaticInputs(batches[0], batches[0], torch.device(device))
    for batch in batches:
        inputs.copy_from(batch)
        for static, given in zip(inputs.leaves, batch, strict=True):
            assert static is not given
            assert static.dtype == given.dtype
            assert torch.equal(static, given)


def test_never_broadcasts(device):
    """Hazard 3: a last batch of one would fill a bigger static input."""
    inputs = make(device, torch.zeros(4, 2, device=device))
    with pytest.raises(AssertionError):
        inputs.copy_from([torch.ones(1, 2, device=device)])


def test_one_tensor_given_twice_stays_one(device):
    x = torch.zeros(2, device=device)
    inputs = make(device, x, x)
    assert inputs.leaves[0] is inputs.leaves[1]


def test_refuses_what_has_no_static_twin():
    with pytest.raises(UnkeyableBatchError, match=r"batch\[0\] overlaps itself"):
        make(torch.device("cpu"), torch.arange(5.0).unfold(0, 3, 1))
    with pytest.raises(UnkeyableBatchError, match=r"batch\[0\] is on meta, the graphs run on cpu"):
        make(torch.device("cpu"), torch.zeros(1, device="meta"))
