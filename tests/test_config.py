"""The configuration: each file composes and agrees with the code."""

import dataclasses
import inspect
import itertools
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from cg_lightning import CUDAGraphCallback, CUDAGraphMode, CUDAGraphOptions
from cg_lightning.app.config import CUDAGraphConfig, OptionsConfig, config_dir, register_configs

CONF = Path(__file__).parent.parent / "conf"
OPTIONS = sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml"))


@pytest.fixture(autouse=True)
def hydra():
    register_configs()
    with initialize_config_dir(config_dir(), version_base="1.3"):
        yield


def test_the_folder_is_found():
    assert Path(config_dir()) == CONF


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_builds(option):
    config = compose("config", [option])
    group = option.split("=")[0]
    if option == "data=custom":
        assert OmegaConf.is_missing(config.data, "_target_")
    elif option == "trainer=gpu":
        assert config.trainer.accelerator == "gpu"
    elif group == "callbacks":
        for node in config.callbacks.values():
            assert isinstance(instantiate(node, _convert_="all"), CUDAGraphCallback)
    else:
        instantiate(config[group], _convert_="all")


def test_graph_options_reach_the_callback_as_plain_values():
    config = compose(
        "config",
        ["cuda_graph.mode=FULL", "cuda_graph.warmup_steps=1", "cuda_graph.targets=[net.*]"],
    )
    callback = instantiate(config.callbacks.cuda_graph, _convert_="all")
    assert callback._settings.mode is CUDAGraphMode.FULL
    assert callback._settings.warmup_steps == 1
    assert callback._settings.targets == ("net.*",)
    assert type(callback._settings.options) is CUDAGraphOptions


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("cuda_graph.warmup=1", ["warmup", "CUDAGraphConfig"]),
        ("cuda_graph.warmup_steps=many", ["many", "warmup_steps"]),
        ("cuda_graph.options.gc=true", ["gc", "OptionsConfig"]),
        ("task=train", ["train", "fit, validate, test, predict"]),
        ("seeds=1", ["seeds"]),
        ("cuda_graph=quick", ["quick", "piecewise"]),
        ("data.batch_sise=3", ["batch_sise"]),
    ],
)
def test_a_misspelt_key_or_wrong_type_fails_at_compose_time(override, parts):
    with pytest.raises((ConfigCompositionException, HydraException)) as caught:
        compose("config", [override])
    message = f"{caught.value} {caught.value.__cause__}"
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("schema", "constructor"),
    [(CUDAGraphConfig, CUDAGraphCallback), (OptionsConfig, CUDAGraphOptions)],
)
def test_the_schema_says_what_the_constructor_says(schema, constructor):
    fields = {
        field.name: field for field in dataclasses.fields(schema) if not field.name.startswith("_")
    }
    parameters = inspect.signature(constructor).parameters
    assert list(fields) == list(parameters)
    for name, parameter in parameters.items():
        default = getattr(schema(), name)
        if name == "options":
            assert instantiate(default) == CUDAGraphOptions()
        else:
            assert (
                tuple(default) if isinstance(default, list) else default
            ) == parameter.default, name


def test_every_key_is_commented():
    for path in CONF.rglob("*.yaml"):
        lines = path.read_text().splitlines()
        assert lines[0].startswith("#"), path
        for before, line in itertools.pairwise(lines):
            name = line.strip().split(":")[0]
            if (
                ":" in line
                and not line.strip().startswith(("#", "-"))
                and name not in ("defaults", "_target_", "options")
            ):
                assert before.strip().startswith("#"), f"{path}: {line}"


def test_there_are_few_files():
    assert len(list(CONF.rglob("*.yaml"))) <= 20


def test_another_project_selects_the_callback_from_its_search_path(tmp_path):
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks/default.yaml").write_text(
        "mine:\n  _target_: lightning.pytorch.callbacks.Timer\n"
    )
    (tmp_path / "main.yaml").write_text(
        f"defaults:\n  - callbacks: [default, cuda_graph]\n  - _self_\nhydra:\n  searchpath: ['file://{CONF}']\n"
    )
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        config = compose("main", ["cuda_graph=full", "cuda_graph.max_graphs=5"])
    assert list(config.callbacks) == ["mine", "cuda_graph"]
    callback = instantiate(config.callbacks.cuda_graph, _convert_="all")
    assert callback._settings.mode is CUDAGraphMode.FULL
    assert callback._settings.max_graphs == 5
