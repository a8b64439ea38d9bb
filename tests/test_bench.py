"""The benchmark runs, compares and writes. The times that it measures here mean nothing."""

import json
from pathlib import Path

import pytest
import torch

from cg_lightning.backends import cuda, resolve_backend
from cg_lightning.bench import charts, report
from cg_lightning.bench.cases import CASES, CLASSES
from cg_lightning.bench.costs import measure_costs
from cg_lightning.bench.measure import Settings
from cg_lightning.bench.records import (
    environment,
    gpu_time,
    limit,
    optimizer_time,
    read_lines,
    write_lines,
)
from cg_lightning.bench.run import check, measure, measure_case
from cg_lightning.bench.tables import details, facts, fill_page, results, table, training_facts

FEW = Settings(batches=4, warmup=6, rounds=1)
OURS = ["loop", "loop_and_logs", "eager", "piecewise", "full", "full_and_piecewise"]


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


OF_LIBRARIES = [name for name, case in CASES.items() if case.library]


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_LIBRARIES)
def test_networks_of_other_libraries_give_logits(name):
    library = CASES[name].library
    pytest.importorskip(library, reason=f"{library} is not installed")
    inputs, _ = CASES[name].batch(0)
    with torch.inference_mode():
        logits = CASES[name].network().eval()(inputs[:2])
    assert type(logits) is torch.Tensor
    assert logits.shape == (2, CLASSES)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", OF_LIBRARIES)
def test_networks_of_other_libraries_log_what_eager_logs(name):
    library = CASES[name].library
    pytest.importorskip(library, reason=f"{library} is not installed")
    few = ["eager", "full_and_piecewise"]
    records = list(measure([name], few, ["validate", "predict"], FEW, "cuda"))
    eager, ours, *_ = records
    assert ours["values"] == eager["values"] != {}
    assert ours["mode"] in ("FULL", "PIECEWISE")


def test_a_library_that_is_missing_is_named(monkeypatch):
    from importlib import util

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "timm" else find(name))
    with pytest.raises(ValueError, match=r"bench.cases=vit_timm is a model of timm, .*: pip inst"):
        check(["mlp", "vit_timm"], OURS, ["validate"], "recorder")


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
    files = charts.draw_all(records, tmp_path / "bench")
    assert [file.name for file in files] == ["bench.svg", "bench.png"]
    assert all(file.stat().st_size > 1000 for file in files)
    for file in charts.draw_before_after(records, tmp_path / "before_after"):
        assert file.stat().st_size > 1000


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_training_ends_with_the_weights_of_eager(tmp_path, backend):
    few = Settings(batches=4, warmup=8, rounds=2)
    records = list(measure(["mlp"], OURS, ["train"], few, backend))
    by_name = {record["contestant"]: record for record in records}
    assert list(by_name) == ["loop", "loop_and_logs", "eager", "full_and_piecewise"]
    assert not {"equal"} & (by_name["loop"].keys() | by_name["loop_and_logs"].keys())
    assert by_name["eager"]["equal"]
    ours = by_name["full_and_piecewise"]
    assert (ours["mode"], ours["equal"], ours["difference"]) == ("FULL", True, 0.0)
    assert gpu_time(by_name) == ours["replay"] > 0
    assert optimizer_time(by_name) == by_name["loop"]["replay"] > 0
    on_gpu = ours["replay"] + by_name["loop"]["replay"]
    assert limit(by_name) == max(by_name["loop"]["microseconds"], on_gpu)
    write_lines(records, tmp_path / "bench.jsonl")
    page = (
        "<!-- bench: train -->\n<!-- /bench --> <!-- bench: speed -->as before<!-- /bench -->"
        "<!-- bench: machine -->another<!-- /bench -->"
    )
    filled = fill_page(page, tmp_path / "bench.jsonl")
    assert "| MLP 12 x 512, batch 32 | " in filled
    assert "| weights | eager again | **callback** | `torch.compile` |" in filled
    assert "| MLP 12 x 512, batch 32 | equal | equal | - | - | - |" in filled
    assert "x |\n" in filled
    assert "-->as before<!--" in filled
    assert "-->another<!--" in filled


def test_that_weights_can_differ(monkeypatch, backend):
    from cg_lightning.bench import training

    class Half(training.TrainedStep):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 0.5

    monkeypatch.setitem(training.TRAINERS, "full_and_piecewise", lambda net, *_: (Half(net), []))
    eager, record = measure(["mlp"], ["eager", "full_and_piecewise"], ["train"], FEW, backend)
    assert "equal" not in eager  # of one round
    assert not record["equal"]
    assert 0 < record["difference"] < 1


def test_make_graphed_callables_needs_a_gpu_and_says_so(monkeypatch):
    monkeypatch.setattr(cuda, "is_available", lambda: False)
    (record,) = measure(["mlp"], ["make_graphed_callables"], ["train"], FEW, "recorder")
    assert record["error"] == "RuntimeError: torch.cuda.make_graphed_callables needs a CUDA device"
    assert "fails" in table([record])


@pytest.mark.slow
def test_a_compiled_network_trains():
    _, record = measure(["mlp"], ["eager", "compile"], ["train"], FEW, "recorder")
    assert 0 <= record["difference"] < 1e-3
    filled = training_facts([{**record, "contestant": "full_and_piecewise"}, record])
    assert "1.0 times faster than the best peer" in filled


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own, which would be the peer's error
@pytest.mark.parametrize("name", ["mlp", "resnet18"])  # one with statistics of batch norm
def test_peers_with_graphs_train_near_eager(name):
    peers = ["make_graphed_callables", "reduce_overhead"]
    few = Settings(batches=4, warmup=6, rounds=2)
    _, *records = measure([name], ["eager", *peers], ["train"], few, "cuda")
    assert [record["contestant"] for record in records] == peers
    assert all(record.get("difference", 1) < 0.5 for record in records), records


def test_contestants_that_cannot_train_are_named():
    with pytest.raises(ValueError, match=r"stages=\[train\]: piecewise, full cannot train"):
        check(["mlp"], ["piecewise", "full"], ["train"], "recorder")


def test_the_chart_of_the_readme(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    records = Path(__file__).parent.parent / "notebooks" / "benchmark_h200.jsonl"
    arguments = ["--image", str(tmp_path / "chart"), "--all", str(tmp_path / "all")]
    report.main([str(records), *arguments])
    written = [Path(line) for line in capsys.readouterr().out.split()]
    assert [file.name for file in written] == ["chart.svg", "chart.png", "all.svg", "all.png"]
    assert all(file.stat().st_size > 1000 for file in written)
    assert "<svg" in (tmp_path / "chart.svg").read_text()
    assert (tmp_path / "chart.png").stat().st_size > 1000
    assert charts.draw_before_after(read_lines(records), tmp_path / "none", stage="test") == []


def test_no_text_of_the_chart_stands_on_the_line_of_the_limit(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    drawn = []
    monkeypatch.setattr(charts, "_save", lambda figure, path: drawn.append(figure) or [])
    records = Path(__file__).parent.parent / "notebooks" / "benchmark_h200.jsonl"
    charts.draw_all(read_lines(records), tmp_path / "all")
    (figure,) = drawn
    figure.draw_without_rendering()
    assert len(figure.axes) == 10
    for panel in figure.axes:
        (line,) = panel.lines
        x = panel.transData.transform((line.get_xdata()[0], 0))[0]
        boxes = [text.get_window_extent() for text in panel.texts]
        assert len(boxes) == 4
        assert not [box for box in boxes if box.x0 <= x <= box.x1]
        assert max(box.x1 for box in boxes) <= panel.get_window_extent().x1


MEASURED = [
    {"case": "mlp", "stage": "validate", "contestant": name, **record}
    for name, record in {
        "loop": {"microseconds": 80.0, "spread": 1.0},
        "eager": {"microseconds": 400.0, "spread": 9.0},
        "full_and_piecewise": {"microseconds": 100.0, "spread": 2.0, "replay": 96.0},
        "compile": {"error": "RuntimeError: no compiler"},
        "reduce_overhead": {"microseconds": 250.0, "spread": 3.0},
    }.items()
]


def test_pages_are_filled_from_records(tmp_path, capsys):
    write_lines(MEASURED, tmp_path / "bench.jsonl")
    page = tmp_path / "page.md"
    blocks = "".join(f"<!-- bench: {name} -->\n<!-- /bench -->\n" for name in ("results", "facts"))
    page.write_text(f"# A page\nIt is <!-- bench: speed -->?<!-- /bench -->.\n{blocks}The end.\n")
    report.main([str(tmp_path / "bench.jsonl"), "--pages", str(page)])
    assert capsys.readouterr().out == f"{page}\n"
    assert page.read_text() == (
        "# A page\nIt is <!-- bench: speed -->4 to 4 times faster<!-- /bench -->.\n"
        f"<!-- bench: results -->\n{results(MEASURED)}<!-- /bench -->\n"
        f"<!-- bench: facts -->\n{facts(MEASURED)}<!-- /bench -->\nThe end.\n"
    )
    assert "| MLP 12 x 512, batch 32 | 96 | 400 | 250 | - | **100** | 4.0x |" in results(MEASURED)
    assert "| MLP 12 x 512, batch 32 | 96 | 400 (9) | **100** (2) | - | 250 (3) |" in details(
        MEASURED, "validate"
    )
    assert "2.5 to 2.5 times faster than the best peer" in facts(MEASURED)
    assert "1.042 to 1.042 times the limit in 1 of 1 cases" in facts(MEASURED)


def test_a_page_that_asks_for_unknown_figures_is_not_touched(tmp_path):
    write_lines(MEASURED, tmp_path / "bench.jsonl")
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text("<!-- bench: speed --><!-- /bench -->")
    bad.write_text("<!-- bench: sped --><!-- /bench -->")
    with pytest.raises(ValueError, match="bench: sped --> has no such figures; choose from"):
        report.main([str(tmp_path / "bench.jsonl"), "--pages", str(good), str(bad)])
    assert good.read_text() == "<!-- bench: speed --><!-- /bench -->"
    assert fill_page("no figures", tmp_path / "bench.jsonl") == "no figures"


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
