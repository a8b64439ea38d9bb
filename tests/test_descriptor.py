"""The key of a batch: equal for equal batches, different for all others."""

import collections
import copy
import dataclasses
import enum
import itertools
import pickle

import pytest
import torch
from torch import nn

from cg_lightning import BatchDescriptor, UnkeyableBatchError
from cg_lightning.core.kernel_flags import NAMES, differing_flag, kernel_flags

describe = BatchDescriptor.from_batch
Pair = collections.namedtuple("Pair", "left right")


class Colour(enum.Enum):
    RED = 1
    CRIMSON = "red"


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    n: int = 1


class Encoding(collections.UserDict):
    """A mapping like Hugging Face's ``BatchEncoding``."""


def make(kind, x):
    return {
        "tensor": lambda: x,
        "tuple": lambda: (x, 1),
        "list": lambda: [x, {"a": (x[:0].clone(), None)}],
        "dict": lambda: {"x": x, "k": {"deep": 2.0}},
        "ordered": lambda: collections.OrderedDict(x=x),
        "namedtuple": lambda: Pair(x, "s"),
        "dataclass": lambda: Record(x),
        "mapping": lambda: Encoding(x=x),
    }[kind]()


@pytest.mark.parametrize(
    "kind", ["tensor", "tuple", "list", "dict", "ordered", "namedtuple", "dataclass", "mapping"]
)
def test_equal_batches_have_equal_keys_and_other_shapes_do_not(kind):
    one, same, other = (describe(make(kind, torch.randn(n, 2))) for n in (3, 3, 4))
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one.batch_size == 3


def test_every_tensor_attribute_counts():
    base = torch.zeros(2, 4)
    keys = [
        describe(x)
        for x in (
            base,
            base.double(),
            torch.zeros(4, 2).t(),
            torch.zeros(2, 4, device="meta"),
            torch.zeros(2, 4, requires_grad=True),
            torch.zeros(1, 4).expand(2, 4),
        )
    ]
    assert len(set(keys)) == len(keys)


def test_plain_values_differ_by_type_and_value():
    leaves = [
        True,
        1,
        1.0,
        False,
        0,
        0.0,
        -0.0,
        "1",
        b"1",
        None,
        Colour.RED,
        Colour.CRIMSON,
        torch.float32,
    ]
    keys = [describe((torch.zeros(1), leaf)) for leaf in leaves]
    for (a, one), (b, other) in itertools.combinations(zip(leaves, keys, strict=True), 2):
        assert one != other, (a, b)
    nan = float("nan")
    assert describe((nan,)) == describe((float("nan"),))


class Label(str):
    pass


class Code(enum.IntEnum):
    ONE = 1


class Compared:
    """Equal to all others."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Compared)

    def __hash__(self) -> int:
        return 1


def test_keys_of_mappings_differ_by_type_and_value():
    keys = [
        *(True, 1, 1.0, Code.ONE, 0.0, -0.0, "a", Label("a"), (1, "a"), (True, "a"), (1.0, "a")),
        *(frozenset({1}), frozenset({True}), Compared(), Compared(), float("nan")),
    ]
    described = [describe([{key: torch.zeros(1)}]) for key in keys]
    for (a, one), (b, other) in itertools.combinations(zip(keys, described, strict=True), 2):
        assert one != other, (a, b)
    for key in keys:
        assert describe([{key: torch.zeros(1)}]) == describe([{key: torch.zeros(1)}])
    assert describe({(1, float("nan")): 1}) == describe({(1, float("inf") - float("inf")): 1})


def test_nan_that_is_not_the_same_object():
    assert describe({"t": float("inf") - float("inf")}) == describe({"t": float("nan")})


@pytest.mark.parametrize(
    ("batch", "path"),
    [
        ({"x": [torch.zeros(1), object()]}, "batch['x'][1]"),
        (Record(torch.zeros(1), {1, 2}), "batch.n"),
        (Pair(torch.zeros(1), lambda: 0), "batch[1]"),
        ((torch.zeros(1).to_sparse(),), "batch[0]"),
        ((torch.zeros(2, dtype=torch.complex64).conj(),), "batch[0]"),
        ((torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)]),), "batch[0]"),
    ],
)
def test_a_leaf_that_cannot_be_keyed_is_named(batch, path):
    with pytest.raises(UnkeyableBatchError) as caught:
        describe(batch)
    assert str(caught.value).startswith(path)
    assert caught.value.path == path


def test_shared_storage_is_refused():
    x = torch.zeros(4)
    for batch in ((x, x), {"a": x, "b": x[:2]}):
        with pytest.raises(UnkeyableBatchError, match="shares storage with"):
            describe(batch)
    empty = torch.zeros(0)
    describe((empty, empty.clone()))


def test_stage_loader_and_training_flags_count():
    x = torch.zeros(1)
    net = nn.Sequential(nn.Dropout(), nn.Linear(1, 1)).eval()
    base = describe(x, stage="validate", modules=net.modules())
    assert base != describe(x, stage="test", modules=net.modules())
    assert base != describe(x, stage="validate", dataloader_idx=1, modules=net.modules())
    net[0].train()
    assert base != describe(x, stage="validate", modules=net.modules())


def _default_dtype():
    torch.set_default_dtype(torch.float64)
    return lambda: torch.set_default_dtype(torch.float32)


def _setter(owner, name, value):
    def change():
        before = getattr(owner, name)
        setattr(owner, name, value)
        return lambda: setattr(owner, name, before)

    return change


def _precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    return lambda: torch.set_float32_matmul_precision(before)


def _deterministic():
    torch.use_deterministic_algorithms(True)
    return lambda: torch.use_deterministic_algorithms(False)


def _autocast_on_cuda():  # the context needs a GPU
    torch.set_autocast_enabled("cuda", True)
    return lambda: torch.set_autocast_enabled("cuda", False)


def _entered(context):
    def change():
        context.__enter__()
        return lambda: context.__exit__(None, None, None)

    return change


def _sdp(name):
    def change():
        before = getattr(torch.backends.cuda, f"{name}_sdp_enabled")()
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(not before)
        return lambda: getattr(torch.backends.cuda, f"enable_{name}_sdp")(before)

    return change


def _math_sdp_reduction():
    allow = torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp
    allow(True)
    return lambda: allow(False)


def _sdp_order():
    before = torch._C._get_sdp_priority_order()
    torch._C._set_sdp_priority_order(before[::-1])
    return lambda: torch._C._set_sdp_priority_order(before)


MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn
SWITCHES = [
    ("torch.get_default_dtype()", _default_dtype),
    ("deterministic algorithms", _deterministic),
    ("torch.backends.cudnn.benchmark", _setter(CUDNN, "benchmark", True)),
    ("torch.backends.cudnn.deterministic", _setter(CUDNN, "deterministic", True)),
    ("torch.backends.cudnn.enabled", _setter(CUDNN, "enabled", False)),
    ("precision of float32", _precision),
    ("precision of float32", _setter(CUDNN, "allow_tf32", False)),
    ("precision of float32", _setter(MATMUL, "allow_tf32", True)),
    (
        "reduced precision in float16",
        _setter(MATMUL, "allow_fp16_reduced_precision_reduction", False),
    ),
    (
        "reduced precision in bfloat16",
        _setter(MATMUL, "allow_bf16_reduced_precision_reduction", False),
    ),
    ("accumulation in float16", _setter(MATMUL, "allow_fp16_accumulation", True)),
    ("flash SDPA", _sdp("flash")),
    ("memory-efficient SDPA", _sdp("mem_efficient")),
    ("math SDPA", _sdp("math")),
    ("cuDNN SDPA", _sdp("cudnn")),
    ("reduced precision in math SDPA", _math_sdp_reduction),
    ("order of SDPA", _sdp_order),
    ("grad mode", _entered(torch.no_grad())),
    ("inference mode", _entered(torch.inference_mode())),
    ("function modes", _entered(torch.device("meta"))),
    ("autocast on cuda", _autocast_on_cuda),
    ("autocast on cpu", _entered(torch.autocast("cpu", torch.bfloat16))),
]


@pytest.mark.parametrize(("name", "change"), SWITCHES, ids=[name for name, _ in SWITCHES])
def test_switches_that_change_kernels_count(name, change):
    """Hazard 14. The message names the one that differs."""
    x = torch.zeros(1)
    before, flags = describe(x), kernel_flags()
    undo = change()
    try:
        assert describe(x) != before
        # inference mode switches gradients off as well
        names = {"grad mode", name} if name == "inference mode" else {name}
        assert differing_flag(kernel_flags(), flags)[0] in names
    finally:
        undo()


def test_each_switch_is_tested():
    assert {name for name, _ in SWITCHES} == set(NAMES)


def test_grad_inference_and_autocast_count():
    x = torch.zeros(1)
    keys = [describe(x)]
    with torch.no_grad():
        keys.append(describe(x))
    with torch.inference_mode():
        keys.append(describe(x))
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                keys.append(describe(x))
    assert len(set(keys)) == len(keys)


def test_made_by_hand():
    assert BatchDescriptor(batch_size=8) == BatchDescriptor(batch_size=8)
    assert BatchDescriptor(batch_size=8) != BatchDescriptor(batch_size=8, call=1)
    assert BatchDescriptor(batch_size=8) in {BatchDescriptor(batch_size=8): 1}


def test_frozen_and_picklable():
    key = describe((torch.zeros(2, 3), "a"), stage="test")
    with pytest.raises(dataclasses.FrozenInstanceError):
        key.stage = "validate"
    assert pickle.loads(pickle.dumps(key)) == key
    assert copy.deepcopy(key) == key
    assert dataclasses.replace(key, call=2).call == 2


def test_shapes_for_people():
    assert describe((torch.zeros(8, 3, 2), torch.zeros(()), "x")).shapes() == "8x3x2, scalar"
    assert BatchDescriptor(batch_size=8).shapes() == "batch_size=8"
