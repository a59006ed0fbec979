"""Check of ``adapter.modules`` and ``adapter.rank``: whether the step's model has such layers.

A step of a pipeline may start from the model of an earlier step that has not run; its layers are those of the model
that the earlier step starts from. This module imports no torch at module level.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

from rlhf.errors import UserError, key
from rlhf.models.lineage import of_hub
from rlhf.models.saved_config import replace_published
from rlhf.planning.checks import context_length as context
from rlhf.runs.run_directory import Run
from rlhf.storage.plain import Plain

if TYPE_CHECKING:
    from rlhf.planning.step import Step


def check(step: "Step", earlier: Iterable["Step"]) -> None:
    """Raise for adapted layers that the model lacks or that cannot be adapted, and for a rank above its hidden size.

    A model whose config is not on this machine is skipped; the same check runs when it is loaded.

    Args:
        step: A step that is to run.
        earlier: Steps of the same plan, whose models it may start from before they are made.

    Raises:
        UserError: One line that names the key.
    """
    adapter = step.config.get("adapter") or {}
    names, rank, earlier = adapter.get("modules", "all-linear"), adapter.get("rank"), list(earlier)
    width = None if rank is None else context.size(step.config["model"], earlier, ("hidden_size", "n_embd", "d_model"))
    if rank is not None and width is not None and rank > width:
        raise UserError(
            f"no update of this model's layers has a rank above {width}, its hidden size",
            fix=f"type {key('adapter.rank', min(16, width))}",
            option="adapter.rank",
            value=rank,
        )
    if names == "all-linear" or Run(step.folder).finished:
        return
    shape = _shape(step.config["model"], {str(one.folder): one for one in earlier}, names)
    if shape is None:
        return
    from rlhf.models.adapters import LoRA
    from rlhf.models.causal_lm import CausalLM

    adapter = instantiate(OmegaConf.create(step.config["adapter"]), _convert_="all")
    spec = instantiate(OmegaConf.create(shape), _convert_="all")
    if not isinstance(adapter, LoRA) or not isinstance(spec, CausalLM) or spec.trust_remote_code:
        return
    try:
        model = spec.build_on_meta()
    except (UserError, ValueError, OSError):  # errors of the model itself are reported when it is loaded
        return
    adapter.check_modules(model)


def _shape(model: Plain, made: dict[str, "Step"], names: Any) -> Plain | None:
    """Return the ``model`` group with a path at which its configuration already exists, or with its architecture.

    None if there is no such path, or if the model is made by a step that adapts the same layers (checked there).
    """
    seen: set[str] = set()
    while (path := model.get("path")) is not None:
        path = str(path)
        step = made.get(path) or made.get(path.removesuffix("/model"))
        if step is not None and not Run(step.folder).finished and path not in seen:
            if (step.config.get("adapter") or {}).get("modules") == names:
                return None
            seen.add(path)
            model = step.config["model"]
            continue
        folder = _folder(path)
        if folder is not None:
            return {**model, "path": str(folder)}
        known = replace_published(model)
        return known if known["path"] is None else None
    return model if model.get("architecture") else None


def _folder(path: str) -> Path | None:
    """Return the directory that holds the configuration of a directory, a converted GGUF file or a cached hub model."""
    places: list[Any] = [Path(path), Path(path) / "model"]
    if path.endswith(".gguf"):
        from rlhf.models.gguf import place

        places = [place(path)] if Path(path).expanduser().is_file() else []
    elif not Path(path).exists():
        places = [of_hub(path)]
    return next((folder for folder in places if folder is not None and (folder / "config.json").is_file()), None)
