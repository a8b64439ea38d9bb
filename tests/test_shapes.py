"""Which sizes are proposed for shapes that vary, and where users read them."""

from __future__ import annotations

import itertools
import random
import re
import warnings

import pytest
import torch
from torch.utils.data import DataLoader

from cg_lightning import CUDAGraphCallback
from cg_lightning.app.docstrings import DocstringData
from cg_lightning.app.shapes import count_shapes
from cg_lightning.backends import resolve_backend
from cg_lightning.bench import shapes
from cg_lightning.bench.cases import CLASSES
from cg_lightning.core.shape_proposal import SeenShape, ShapeProposal, propose_sizes
from tests.test_padding import Step, _masked_attention, padded_steps, run, texts


def padding(counts: dict[int, int], sizes: tuple[int, ...]) -> int:
    return sum(
        number * (min(size for size in sizes if size >= given) - given)
        for given, number in counts.items()
    )


@pytest.mark.parametrize("seed", range(5))
def test_no_other_sizes_have_less_padding(seed):
    generator = random.Random(seed)
    counts = {generator.randint(1, 40): generator.randint(1, 9) for _ in range(9)}
    for most in (1, 2, 3, 20):
        proposed = propose_sizes(counts, most)
        assert len(proposed) == len(set(proposed)) <= most
        others = itertools.combinations(sorted(counts), min(most, len(counts)))
        best = min(padding(counts, sizes) for sizes in others if max(sizes) == max(counts))
        assert padding(counts, tuple(proposed)) == best


@pytest.mark.parametrize("number", [257, 2048, 30_000])
def test_very_many_sizes(number):
    """The time would grow with the square of their number: hours for recordings of any length."""
    counts = dict.fromkeys(range(1, number + 1), 2)
    proposed = propose_sizes(counts)
    least = [number * part // 8 for part in range(1, 9)]
    assert len(proposed) == 8
    assert max(proposed) == number
    assert padding(counts, tuple(proposed)) <= 1.01 * padding(counts, tuple(least))


def test_the_docstrings_of_the_standard_library():
    seen = count_shapes(iter(DocstringData().predict_dataloader()))
    proposal = ShapeProposal(seen)
    assert len(seen) > 10
    assert proposal.graphs <= 9
    assert 0 < proposal.waste < 0.1
    assert proposal.pad_dims["input_ids"] == proposal.pad_dims["attention_mask"]
    CUDAGraphCallback(
        capture_sizes=proposal.capture_sizes or None,
        pad_dims=proposal.pad_dims,
        verify_tolerance="close",
    )


def test_the_benchmark_counts_what_its_graphs_did(backend, device, capsys):
    """Each of six batches comes six times."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(
        **sizes, intermediate_size=16, num_labels=CLASSES, attn_implementation="sdpa"
    )
    model = shapes.TextClassifier(transformers.BertForSequenceClassification(config)).to(device)
    batches = shapes.texts(6, device) * 6
    settings = shapes.settings_for(batches)
    sizes_of_ids = settings["pad_dims"]["input_ids"][1]["sizes"]
    assert sizes_of_ids == sorted({batch["input_ids"].shape[1] for batch in batches})
    settings["pad_dims"] = {
        name: {1: {"sizes": sizes_of_ids[1::2], "value": 0}} for name in settings["pad_dims"]
    }
    of_backend = resolve_backend(backend, device)
    for stage in ("predict", "validate"):
        model.to(device).eval()
        eager = shapes.run(model, batches, stage, None, of_backend)
        callback = CUDAGraphCallback(backend=backend, report=False, min_saving=0, **settings)
        model.to(device)
        ours = shapes.run(model, batches, stage, callback, of_backend)
        for one, other in zip(ours.values, eager.values, strict=True):
            torch.testing.assert_close(one, other)
        assert 0 < ours.steady < ours.seconds
        shapes._print_times(stage, {"eager": eager, "padded graphs": ours})
        shapes._print_counts(stage, "padded graphs", callback)
        printed = capsys.readouterr().out
        padded = sum(record.steps for record in callback.stats.padding)
        assert padded >= len(batches) / 6, printed
        steps = re.findall(r"^  (\d+) steps (\w+): ", printed, re.MULTILINE)
        assert sum(int(number) for number, _ in steps) == len(batches), printed
        graphs = re.findall(r"padded graphs: (\d+) graphs, \d+\.\d% padding", printed)
        assert graphs == [str(callback.stats.captures)], printed


def test_nothing_is_proposed_for_one_shape():
    assert ShapeProposal([SeenShape(("0",), ((4, 8),), 9)]).arguments == ""


def test_one_warning_has_the_settings_that_catch_the_shapes(harness):
    data = texts(*[length for length in range(4, 28) for _ in range(2)])
    model = Step(_masked_attention)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        harness.trainer(harness.callback()).predict(model, DataLoader(data, batch_size=None))
    said = [str(each.message) for each in caught if "pad_dims" in str(each.message)]
    assert len(said) == 1
    assert "48 batches of stage 'predict' had 24 shapes" in said[0]
    settings = said[0].split("CUDAGraphCallback(")[1].split(").\n")[0]
    callback = run(harness, model, data * 2, **eval(f"dict({settings})"))
    assert padded_steps(callback) >= 12, callback.summary()


@pytest.mark.parametrize(("size", "is_warned"), [(4, True), (64, False)])
def test_sizes_that_catch_no_shape_are_named_as_well(harness, size, is_warned):
    """All batches are larger than the largest size."""
    data = [torch.randn(rows, 8) for rows in [*range(5, 45)] * 2]
    settings = {"capture_sizes": [size], "verify_tolerance": "close"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        harness.trainer(harness.callback(**settings)).predict(
            Step(lambda self, batch: self.net(batch)), DataLoader(data, batch_size=None)
        )
    assert is_warned == any("80 batches of stage 'predict'" in str(each.message) for each in caught)


def test_nobody_is_warned_where_shapes_repeat(harness):
    data = texts(*[5, 7] * 6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        harness.trainer(harness.callback()).predict(
            Step(_masked_attention), DataLoader(data, batch_size=None)
        )
    assert not [each for each in caught if "pad_dims" in str(each.message)]


def test_tensors_that_are_no_batch_are_left_out():
    seen = [SeenShape(("x", "n"), ((rows, 3), ()), 2) for rows in (4, 2)]
    proposal = ShapeProposal([*seen, SeenShape(("y",), ((1,),), 1)])
    assert proposal.capture_sizes == [2, 4]
    assert proposal.pad_dims == {}
