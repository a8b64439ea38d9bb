"""The benchmark runs, compares and writes. The times that it measures here mean nothing."""

import json
from pathlib import Path

import pytest
import torch

from cg_lightning.backends import resolve_backend
from cg_lightning.bench import report
from cg_lightning.bench.cases import CASES, CLASSES
from cg_lightning.bench.costs import measure_costs
from cg_lightning.bench.measure import Settings
from cg_lightning.bench.report import environment, limit, read_lines, table, write_lines
from cg_lightning.bench.run import measure, measure_case

FEW = Settings(batches=4, warmup=6, rounds=1)
OURS = ["loop", "eager", "piecewise", "full", "full_and_piecewise"]


@pytest.mark.parametrize("name", ["mlp", "gru"])
def test_networks_give_logits(name):
    inputs, labels = CASES[name].batch(0)
    logits = CASES[name].network()(inputs)
    assert logits.shape == (len(labels), CLASSES)
    assert len(set(labels.tolist())) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vit", "bert"])
def test_large_networks_give_logits(name):
    inputs, _ = CASES[name].batch(0)
    with torch.inference_mode():
        assert CASES[name].network().eval()(inputs[:1]).shape == (1, CLASSES)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:predict returned None")
def test_all_of_ours_log_what_eager_logs(tmp_path, backend):
    records = list(measure(["mlp"], OURS, ["validate", "predict"], FEW, backend))
    assert [record["contestant"] for record in records] == OURS * 2
    by_name = {record["contestant"]: record for record in records if record["stage"] == "validate"}
    assert by_name["full"]["mode"] == "FULL"
    assert by_name["piecewise"]["mode"] == "PIECEWISE"
    assert by_name["full"]["values"] == by_name["eager"]["values"] != {}
    predicted = {record["contestant"]: record for record in records if record["stage"] == "predict"}
    assert predicted["full"]["values"] == predicted["eager"]["values"] != {}
    assert predicted["full"]["replay"]
    replays = [record["replay"] for record in by_name.values() if record["replay"]]
    assert len(replays) == 2
    assert limit(by_name) == max(by_name["loop"]["microseconds"], min(replays))
    write_lines(records, tmp_path / "bench.jsonl")
    assert read_lines(tmp_path / "bench.jsonl") == records
    assert (
        json.loads((tmp_path / "bench.jsonl").read_text().splitlines()[0])["torch"]
        == environment()["torch"]
    )
    assert "validate, mlp" in table(records)
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    report.draw_all(records, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 1000
    for file in report.draw_before_after(records, tmp_path / "before_after"):
        assert file.stat().st_size > 1000


def test_the_chart_of_the_readme(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    records = Path(__file__).parent.parent / "notebooks" / "benchmark_h200.jsonl"
    report.main([str(records), str(tmp_path / "chart")])
    assert [Path(line).name for line in capsys.readouterr().out.split()] == [
        "chart.svg",
        "chart.png",
    ]
    assert "<svg" in (tmp_path / "chart.svg").read_text()
    assert (tmp_path / "chart.png").stat().st_size > 1000
    assert report.draw_before_after(read_lines(records), tmp_path / "none", stage="test") == []


@pytest.mark.slow
def test_costs(backend):
    costs = measure_costs(FEW, backend)["costs"]
    assert set(costs["host_microseconds"]) == {"any_callback", "other_stage", "step"}
    assert costs["capture_milliseconds"] > 0
    assert (costs["keys_mebibytes"] > 0) == (backend == "cuda")


@pytest.mark.slow
def test_that_the_comparison_can_fail(monkeypatch, backend):
    from cg_lightning.bench import contestants

    wrong = lambda net, sample, backend: (
        contestants.BenchmarkStep(torch.nn.Sequential(net, torch.nn.Softmax(1))),
        [],
    )
    monkeypatch.setitem(contestants.CONTESTANTS, "full", wrong)
    resolved = resolve_backend(backend)
    assert resolved is not None
    with pytest.raises(AssertionError, match="full: loss is"):
        list(measure_case("mlp", ["validate"], ["eager", "full"], FEW, resolved))


@pytest.mark.parametrize(
    "arguments",
    [(["mpl"], OURS, ["validate"]), (["mlp"], ["ful"], ["validate"]), (["mlp"], OURS, ["fit"])],
)
def test_unknown_names_are_named(arguments):
    with pytest.raises(ValueError, match="choose from"):
        list(measure(*arguments, FEW, "recorder"))
