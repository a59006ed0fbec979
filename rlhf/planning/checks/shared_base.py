"""Check of ``adapter.shared_base``: which models of a step share one base, from configs alone, without loading them.

A step of a pipeline may start from models that its earlier steps have not made yet. The base of these is known from
their configs, so models that cannot share one are reported before the first of them is trained.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from rlhf.models.lineage import Planned, adapter_path
from rlhf.runs.run_directory import Run
from rlhf.signatures import groups
from rlhf.storage.plain import Plain, targets

if TYPE_CHECKING:
    from rlhf.models.shared_base import SharedBase
    from rlhf.planning.step import Step


def shared_base(config: Plain, planned: Mapping[str, Planned] | None = None) -> "SharedBase | None":
    """Return the base shared by all roles of a step; None unless ``adapter.shared_base`` is set and there are several.

    Args:
        config: Resolved config of one step.
        planned: Model directories that have not been made yet -> the base that they will have.

    Raises:
        UserError: The models have no common base, or their adapters cannot be added up.
    """
    from rlhf.models.shared_base import SharedBase

    if not (config.get("adapter") or {}).get("shared_base"):
        return None
    stage = get_object(config["stage"]["_target_"])
    hyperparameters: dict[str, bool] = getattr(stage, "auxiliary_models", {})
    rewards = dict(_rewards(config, groups(stage)))
    if not (hyperparameters or rewards):
        return None
    others = {
        f"stage.{hyperparameter}": str(config["stage"][hyperparameter])
        for hyperparameter in hyperparameters
        if config["stage"].get(hyperparameter)
    } | rewards
    trained = [f"stage.{hyperparameter}" for hyperparameter, learns in hyperparameters.items() if learns]
    spec, adapter, precision = (
        instantiate(OmegaConf.create(config[name]), _convert_="all") for name in ("model", "adapter", "precision")
    )
    return SharedBase.find(spec, adapter, precision, others, trained, planned)


def check(step: "Step", earlier: Iterable["Step"]) -> None:
    """Raise for a step whose models cannot share a base as its config requires.

    Args:
        step: A step that is to run.
        earlier: Steps of the same plan, whose models it may read before they are made.

    Raises:
        UserError: One line.
    """
    if (step.config.get("adapter") or {}).get("shared_base") and not Run(step.folder).finished:
        shared_base(step.config, dict(found for one in earlier for found in _models(one)))


def _rewards(config: Plain, asked: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Yield (config key, path) of every reward model that the stage reads."""
    from rlhf.reward.model import ModelReward

    for group in asked:
        for key, node in targets(config.get(group), group):
            target = get_object(node["_target_"])
            if isinstance(target, type) and issubclass(target, ModelReward):
                yield f"{key}.path", str(node["path"])


def _models(step: "Step") -> Iterable[tuple[str, Planned]]:
    """Yield (directory, description) of the model that a step will make, with its adapter if it trains one."""
    folder = step.folder / "model"
    if Run(step.folder).finished:
        return  # the saved model records its own base
    spec = instantiate(OmegaConf.create(step.config["model"]), _convert_="all")
    node: Any = step.config.get("adapter") or {}
    adapter = get_object(node["_target_"]) if "_target_" in node else None
    # On random weights an adapter has no base on disk, so its model counts as one whose weights were all trained.
    adapted = spec.folder is not None and hasattr(adapter, "decompose")
    yield (
        str(folder),
        Planned(
            adapter=adapter_path(folder) if adapted else None,
            base=spec.folder if adapted else None,
            decompose=bool(getattr(adapter, "decompose", False)),
        ),
    )
