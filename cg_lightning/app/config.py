"""Schemas for Hydra, and the folders of the YAML files. It imports neither torch nor Lightning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import MISSING

from cg_lightning.app.help import HELP
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.settings import CUDAGraphOptions, ModeName, Settings


class Task(Enum):
    """The tasks of ``cg-lightning``."""

    fit = "fit"
    validate = "validate"
    test = "test"
    predict = "predict"
    diagnose = "diagnose"
    shapes = "shapes"
    bench = "bench"
    zoo = "zoo"

    def __str__(self) -> str:  # as on the command line
        return self.value


class DiagnosedStage(Enum):
    """The stages whose step ``task=diagnose`` can watch."""

    validate = "validate"
    test = "test"
    predict = "predict"

    def __str__(self) -> str:
        return self.value


def _type_for_hydra(hint: Any) -> Any:
    """Return the type that OmegaConf checks in place of a type of ours.

    OmegaConf knows no Literal and no Sequence.
    """
    if hint is CUDAGraphOptions or hint == CUDAGraphOptions | None:
        return OptionsConfig
    if hint == CUDAGraphMode | ModeName or get_origin(hint) is Literal:
        return str  # the constructor checks it
    if get_origin(hint) is Sequence:
        return list[_type_for_hydra(get_args(hint)[0])]  # type: ignore[misc]
    if get_origin(hint) is Mapping:
        return dict[get_args(hint)]  # type: ignore[misc]
    arms = [arm for arm in get_args(hint) if arm is not type(None)]
    if len(arms) > 1 and any(get_origin(arm) is Mapping for arm in arms):
        return Any  # a mapping, or else a flag or a name: the constructor checks it
    if type(None) in get_args(hint):
        (inner,) = map(_type_for_hydra, arms)
        return inner | None
    return hint


def _default_for_hydra(field: dataclasses.Field[Any], hint: Any) -> Any:
    default = field.default
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return dataclasses.field(default_factory=hint)
    if isinstance(default, tuple):
        return dataclasses.field(default_factory=lambda: list(default))
    return default


def _schema(name: str, target: str, options: type, **keywords: str) -> type:
    """Make a schema for Hydra of a dataclass of options: the same names, types and defaults.

    Args:
        name: What error messages call it.
        target: What is built of it.
        options: The dataclass.
        **keywords: Further keys for ``hydra.utils.instantiate``.
    """
    keys = {"_target_": f"cg_lightning.{target}", **keywords}
    hints = get_type_hints(options)
    fields: list[tuple[str, Any, Any]] = [(key, str, value) for key, value in keys.items()]
    for field in dataclasses.fields(options):
        hint = _type_for_hydra(hints[field.name])
        fields.append((field.name, hint, _default_for_hydra(field, hint)))
    docstring = f"Schema of :class:`cg_lightning.{target}`."
    return dataclasses.make_dataclass(
        name, fields, namespace={"__doc__": docstring, "__module__": __name__}
    )


OptionsConfig = _schema("OptionsConfig", "CUDAGraphOptions", CUDAGraphOptions)
CUDAGraphConfig = _schema("CUDAGraphConfig", "CUDAGraphCallback", Settings, _convert_="all")


@dataclasses.dataclass
class BenchConfig:
    """Schema of the group ``bench``: the arguments of :func:`cg_lightning.bench.run.measure`."""

    cases: list[str] = MISSING
    contestants: list[str] = MISSING
    stages: list[str] = MISSING
    batches: int = 100
    warmup: int = 20
    rounds: int = 3
    batches_on: str = "device"
    costs: bool = True
    matmul_precision: str = "high"
    backend: str = "auto"
    output: str | None = None


@dataclasses.dataclass
class AppConfig:
    """Schema of ``config.yaml``."""

    model: Any = MISSING
    data: Any = MISSING
    trainer: Any = MISSING
    callbacks: Any = None
    cuda_graph: Any = None
    bench: BenchConfig = dataclasses.field(default_factory=BenchConfig)
    task: Task = Task.fit
    stage: DiagnosedStage = DiagnosedStage.validate
    zoo: list[str] = dataclasses.field(default_factory=lambda: ["*"])
    seed: int = 0
    compare: bool = True
    ckpt_path: str | None = None


class _LibraryConfigs(SearchPathPlugin):
    """Lets the command find the groups that other projects use as well.

    Other applications in this process do not find them.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """See :class:`hydra.plugins.search_path_plugin.SearchPathPlugin`."""
        if any(element.path == config_dir() for element in search_path.get_path()):
            search_path.append("cg_lightning", library_config_dir())


def register_configs() -> None:
    """Register the schemas with Hydra. It may be called several times."""
    store = ConfigStore.instance()
    store.store(name="base_config", node=AppConfig, provider="cg_lightning")
    # Hydra's help and completion leave out what is in hydra/
    group = "hydra/cuda_graph_schema"
    store.store(group=group, name="base", node=CUDAGraphConfig, provider="cg_lightning")
    choices: list[tuple[str, type[Enum]]] = [("task", Task), ("stage", DiagnosedStage)]
    for key, names in choices:
        for (
            name
        ) in names.__members__:  # groups, because Hydra's completion offers only their values
            store.store(
                group=key, name=name, node={key: name}, package="_global_", provider="cg_lightning"
            )
    node = {"app_name": "cg-lightning", "template": HELP}
    store.store(group="hydra/help", name="cg_lightning", node=node, provider="cg_lightning")
    Plugins.instance().register(_LibraryConfigs)


def config_dir() -> str:
    """Return the absolute path of the command's groups: task, model, data, trainer, benchmark."""
    return str(Path(__file__).resolve().parent / "conf")


def library_config_dir() -> str:
    """Return the absolute path of ``conf/``: the groups that other projects find at ``pkg://cg_lightning.conf``.

    It is the packaged copy if there is one, otherwise the folder next to the package in a checkout.
    Hydra resolves relative paths through the package and does not find a folder outside of it
    (hydra#2125).
    """
    package = Path(__file__).resolve().parent.parent
    packaged = package / "conf"
    return str(packaged if packaged.is_dir() else package.parent / "conf")
