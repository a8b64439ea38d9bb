import gc
import weakref

import pytest
import torch

from cg_lightning import weak_ref_tensors
from tests.test_descriptor import Pair


def test_keeps_values_strides_dtype_and_what_is_no_tensor(device):
    x = torch.arange(12.0, device=device).reshape(3, 4)
    tree = {"a": [x.t(), 1], "b": Pair(x[1:, ::2].to(torch.bfloat16), None), "c": x[:0]}
    weak = weak_ref_tensors(tree)
    assert (weak["a"][1], weak["b"].right, type(weak["b"])) == (1, None, Pair)
    for one, other in (
        (weak["a"][0], tree["a"][0]),
        (weak["b"].left, tree["b"].left),
        (weak["c"], tree["c"]),
    ):
        assert one is not other or not other.numel()
        assert (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device)
        assert torch.equal(one, other)
    assert weak["a"][0].stride() == tree["a"][0].stride()
    assert weak["a"][0].data_ptr() == x.data_ptr()


@pytest.mark.gpu
def test_does_not_keep_the_memory():
    gc.collect()
    x = torch.ones(1 << 20, device="cuda")
    before = torch.cuda.memory_allocated()
    weak = weak_ref_tensors(x)
    alive = weakref.ref(x)
    del x
    assert alive() is None
    assert torch.cuda.memory_allocated() == before - (1 << 22)
    assert weak.shape == (1 << 20,)
