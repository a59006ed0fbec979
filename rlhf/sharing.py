"""``adapter.shared_base``: which models of a step sit on one base, told by its config, without loading them.

A step of a pipeline may start from models that its earlier steps have yet to make; what these will sit on is known by
their configs, so that models which cannot share a base are told before the first of them is trained.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from rlhf.config import Plain, targets
from rlhf.models.lineage import Planned, adapter_beside
from rlhf.runs import Run
from rlhf.validation import groups

if TYPE_CHECKING:
    from rlhf.models.shared_base import SharedBase
    from rlhf.plan import Step


def shared_base(config: Plain, planned: Mapping[str, Planned] | None = None) -> "SharedBase | None":
    """The base that all roles of a step sit on, where ``adapter.shared_base`` asks for it and there are several.

    Args:
        config: Of one step, resolved.
        planned: Model folders that are yet to be made -> what they will sit on.

    Raises:
        UserError: If they do not sit on common weights, or their adapters cannot be added up.
    """
    from rlhf.models.shared_base import SharedBase

    if not (config.get("adapter") or {}).get("shared_base"):
        return None
    stage = get_object(config["stage"]["_target_"])
    knobs: dict[str, bool] = getattr(stage, "models_beside", {})
    rewards = dict(_rewards(config, groups(stage)))
    if not (knobs or rewards):
        return None
    others = {f"stage.{knob}": str(config["stage"][knob]) for knob in knobs if config["stage"].get(knob)} | rewards
    trained = [f"stage.{knob}" for knob, learns in knobs.items() if learns]
    spec, adapter, precision = (
        instantiate(OmegaConf.create(config[name]), _convert_="all") for name in ("model", "adapter", "precision")
    )
    return SharedBase.find(spec, adapter, precision, others, trained, planned)


def check(step: "Step", earlier: Iterable["Step"]) -> None:
    """Refuses a step whose models cannot share a base as its config asks.

    Args:
        step: One that is to run.
        earlier: Steps of the same plan, whose models it may read before they are made.

    Raises:
        UserError: One line.
    """
    if (step.config.get("adapter") or {}).get("shared_base") and not Run(step.folder).finished:
        shared_base(step.config, dict(found for one in earlier for found in _models(one)))


def _rewards(config: Plain, asked: Iterable[str]) -> Iterable[tuple[str, str]]:
    """What is typed to name a reward model that the stage reads -> its path."""
    from rlhf.scoring import ModelReward

    for group in asked:
        for key, node in targets(config.get(group), group):
            target = get_object(node["_target_"])
            if isinstance(target, type) and issubclass(target, ModelReward):
                yield f"{key}.path", str(node["path"])


def _models(step: "Step") -> Iterable[tuple[str, Planned]]:
    """The model that a step will make, with its adapter if it trains one."""
    folder = step.folder / "model"
    if Run(step.folder).finished:
        return  # what was made says it itself
    spec = instantiate(OmegaConf.create(step.config["model"]), _convert_="all")
    node: Any = step.config.get("adapter") or {}
    adapter = get_object(node["_target_"]) if "_target_" in node else None
    # On random weights an adapter names no base, and its model counts as one whose weights were all trained.
    adapted = spec.folder is not None and hasattr(adapter, "decompose")
    yield (
        str(folder),
        Planned(
            adapter=adapter_beside(folder) if adapted else None,
            base=spec.folder if adapted else None,
            decompose=bool(getattr(adapter, "decompose", False)),
        ),
    )
