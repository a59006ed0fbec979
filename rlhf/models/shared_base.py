"""Shared base: policy, reference, value and reward model as adapters and heads on one frozen copy of the weights.

Each role has its own tree of modules around the *same* weight tensors, with its own adapters in it. Nothing is switched
on or off between calls, as PEFT's ``set_adapter`` and ``disable_adapter`` would do (which also set ``requires_grad`` on
everything they switch on): gradient checkpointing recomputes a layer inside the same tree that ran it, each role keeps
its own mode and dropout, and a tree costs Python objects, no tensors.

A role's adapters add up: ``W + sum_i (alpha_i / r_i) B_i A_i``. The lower ones are frozen and turn the base into the
model that the role starts from (the SFT adapter, the reward model's); the last one, if the role is trained, is fresh.
That is the same function, with the same gradient, as a fresh adapter on weights into which the lower ones were merged,
so sharing changes memory and not the algorithm. The reference is the policy's tree without its last adapter.
"""

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import UserError, key
from rlhf.models.adapters import TRAINED, LoRA, tied_projection
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel
from rlhf.models.lineage import COPY_ADAPTER_AGAIN, SEPARATE, Planned, common_base, stored_config
from rlhf.models.load_errors import convert_read_errors
from rlhf.models.peft_types import is_peft_model
from rlhf.models.precision import Precision
from rlhf.models.saved_config import output_count_error
from rlhf.models.scalar import ScalarModel
from rlhf.models.special_tokens import find_end_id
from rlhf.models.tokenizer_loading import Corpus

if TYPE_CHECKING:
    from peft import PeftModel

M = TypeVar("M", bound=nn.Module)


def copy_tree(model: M) -> M:
    """Return a second module tree around the same frozen tensors; trained tensors are copied.

    The state that quantised layers keep beside their weights is shared too.
    """
    same: list[Any] = []
    for part in model.modules():
        tensors = [*part._parameters.values(), *part._buffers.values()]
        same += [tensor for tensor in tensors if tensor is not None and not tensor.requires_grad]
        same += [getattr(part, name, None) for name in ("quant_state", "tokenizer", "shared")]
        if hasattr(part, "init_8bit_state"):  # the first forward moves the weight's scales into the state: share it
            same.append(part.state)
    return copy.deepcopy(model, {id(value): value for value in same if value is not None})


class SharedBase:
    """Base weights of all roles of a stage, loaded once, and the module trees around them.

    ``find`` builds it without reading weights.

    Args:
        spec: Source of the policy.
        adapter: Adapter that is trained on top.
        precision: Format of the weights.
        base: Path of the weights; None for the policy's random weights.
        stacks: Path of a model -> the adapters that turn the base into it, lowest first.
    """

    def __init__(
        self,
        spec: CausalLM,
        adapter: LoRA,
        precision: Precision,
        base: str | None,
        stacks: Mapping[str, Sequence[Path]],
    ) -> None:
        self.spec, self.adapter, self.precision = spec, adapter, precision
        self.path, self.stacks = base, dict(stacks)
        self.model: PreTrainedModel | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._plain: Any = None
        self._frozen: dict[Path, dict[str, nn.Parameter]] = {}

    @classmethod
    def find(
        cls,
        spec: CausalLM,
        adapter: LoRA,
        precision: Precision,
        others: Mapping[str, str],
        trained: Collection[str] = (),
        planned: Mapping[str, Planned] | None = None,
    ) -> "SharedBase":
        """Find the base that the policy shares with the other models.

        Args:
            spec: Source of the policy.
            adapter: Adapter that is trained on top.
            precision: Format of the weights.
            others: Config key -> path of the model (run directory, model directory or hub id).
            trained: Keys of ``others`` whose model also gets a fresh adapter.
            planned: Path -> model, for model directories that do not exist yet.

        Raises:
            UserError: If the models have no common base, or their adapters cannot be added up.
        """
        if spec.folder is None:
            for option, path in others.items():
                raise UserError(
                    "cannot share the base of a policy with random weights",
                    fix=f"type {key('inputs.policy', 'RUN')} or {key('adapter.shared_base', 'false')}",
                    option=option,
                    value=path,
                )
            return cls(spec, adapter, precision, None, {})
        paths = {option: _folder(path) for option, path in others.items()}
        base, stacks = common_base(spec.folder, paths, planned)
        found = cls(spec, adapter, precision, base.path, stacks)
        fresh = {spec.folder, *(paths[option] for option in trained if option in paths)}
        kinds = {one.adapter: one.decompose for one in (planned or {}).values()}
        for path, adapters in stacks.items():
            for folder in adapters:
                decompose = kinds[folder] if folder in kinds else _stored_lora(folder)
                found._check(folder, decompose, summed=len(adapters) > 1 or path in fresh, under_fresh=path in fresh)
        return found

    # --- roles ---

    def load(self, corpus: Corpus | None = None) -> "SharedBase":
        """Load the weights if they are not loaded yet, and return the object itself."""
        if self.model is None:
            self.tokenizer = self.spec.load_tokenizer(corpus)
            spec = self.spec if self.path is None else dataclasses.replace(self.spec, path=self.path)
            self.model, self._plain = spec.load_base(self.adapter, self.precision, self.tokenizer)
        return self

    def policy(self, corpus: Corpus | None = None) -> LanguageModel:
        """Build the trained model with a fresh adapter, in a module tree around the shared base."""
        self.load(corpus)
        assert self.model is not None and self.tokenizer is not None
        model = self._role(copy_tree(self.model), self.spec.folder, self.tokenizer, AutoModelForCausalLM, fresh=True)
        model.check_head()
        return model

    def language_model(self, path: str) -> LanguageModel:
        """Build another policy, frozen and in eval mode, as a reference or a sampling policy."""
        self.load()
        assert self.model is not None
        folder = _folder(path)
        tokenizer = CausalLM(folder, None, None).load_tokenizer()
        return self._role(copy_tree(self.model), folder, tokenizer, AutoModelForCausalLM).disable_dropout().frozen()

    def scalar(self, path: str, fresh: bool = False) -> ScalarModel:
        """Build the reward model at ``path``: frozen, or as a critic with a fresh adapter and a trained head.

        If ``path`` is a language model, the head is a fresh one.
        """
        self.load()
        assert self.model is not None
        spec = CausalLM(_folder(path), None, None)
        decoder = copy_tree(self.model.get_decoder())
        role = self._role(decoder, spec.folder, spec.load_tokenizer(), AutoModel, fresh)
        model = ScalarModel(role)
        if spec.scalar:
            model.load_heads(stored_head(Path(str(spec.folder))), Path(str(spec.folder)))
        if not fresh:
            model.requires_grad_(False)
            return model.eval()
        return model.train()

    def restore_start(self, policy: LanguageModel) -> LanguageModel:
        """Return the policy as it was before training, frozen: its module tree without the trained adapter."""
        start = copy_tree(policy)
        assert is_peft_model(start.model)
        below = [name for name in start.model.base_model.active_adapters if name != TRAINED]  # type: ignore[operator,union-attr]
        if below:
            start.model.delete_adapter(TRAINED)
            _activate(start.model, below)
        else:
            start.model = start.model.unload()  # type: ignore[operator]
        return start.frozen()

    # --- construction ---

    def _role(
        self,
        tree: PreTrainedModel,
        path: str | None,
        tokenizer: PreTrainedTokenizerBase,
        kind: Any,
        fresh: bool = False,
    ) -> LanguageModel:
        """Build a role from a module tree: add its frozen adapters, and a fresh adapter if it is trained."""
        model: PreTrainedModel | PeftModel = tree
        names = []
        for folder in self.stacks.get(path, ()) if path else ():
            self._frozen.setdefault(folder, {})
            name = f"below_{list(self._frozen).index(folder)}"
            model = self._mount(model, folder, name)
            names.append(name)
        if fresh and is_peft_model(model):
            model.add_adapter(TRAINED, self.adapter.config(tree))
        elif fresh:
            model = self.adapter.apply(tree)
        if is_peft_model(model):
            _activate(model, [*names, *([TRAINED] if fresh else [])])
        plain = None if self._plain is None else self._plain(kind)
        role = LanguageModel(model, tokenizer, find_end_id(tokenizer), plain, path)
        role.shared = self
        role.adapter, role.precision = self.adapter, self.precision
        role.enable_padding_free()
        if self.spec.gradient_checkpointing and fresh:
            role.gradient_checkpointing(int(self.spec.gradient_checkpointing))
        return role.train()

    def _mount(self, model: "PreTrainedModel | PeftModel", folder: Path, name: str) -> "PeftModel":
        """Add a stored adapter to the model; roles with the same adapter share its tensors."""
        from peft import LoraConfig, get_peft_model  # imported late: it takes seconds
        from peft.utils import load_peft_weights, set_peft_model_state_dict

        base = model.get_base_model() if is_peft_model(model) else model
        stem = "base_model.model."
        own = "" if base.get_decoder() is base else f"{base.base_model_prefix}."
        prefix = "" if self.model is None else f"{self.model.base_model_prefix}."
        with convert_read_errors(folder, COPY_ADAPTER_AGAIN):
            weights = load_peft_weights(str(folder), device="cpu")
            config = LoraConfig.from_pretrained(str(folder))
        state = {stem + own + path.removeprefix(stem).removeprefix(prefix): value for path, value in weights.items()}
        config.inference_mode = False  # otherwise no graph is built through it
        # The tree that it was trained on may have a vocabulary projection where this one has none, or the reverse.
        config.task_type = self.adapter.config(base).task_type
        config.target_modules = {path.removeprefix(stem).rpartition(".lora_")[0] for path in state}
        tied = tied_projection(base)
        if tied in {name.rpartition(".")[2] for name in config.target_modules}:
            raise UserError(
                f"{folder}: its adapter changes {tied}, which shares its weights with the input embedding "
                "(tie_word_embeddings), so it cannot be merged when it is saved",
                fix="train the adapter on other layers",
            )
        # The random initialisation is discarded, so it must not use up random numbers.
        with torch.random.fork_rng(devices=[]):
            if is_peft_model(model):
                model.add_adapter(name, config)
                mounted = model
            else:
                mounted = get_peft_model(model, config, adapter_name=name)  # type: ignore[assignment]
        found = set_peft_model_state_dict(mounted, state, adapter_name=name)
        fresh = {
            path: value for path, value in mounted.named_parameters() if f".{name}." in path or path.endswith(name)
        }
        unexpected = list(found.unexpected_keys)
        if unexpected or len(fresh) != len(state):
            reason = f"unexpected weight {unexpected[0]}" if unexpected else "weights of adapted layers are missing"
            raise UserError(f"{folder}: does not match the layers of {self.path} ({reason})", fix=SEPARATE)
        known = self._frozen[folder]
        for path, value in fresh.items():
            short = path.removeprefix(stem).removeprefix(own)
            if short in known:
                at, _, last = path.rpartition(".")
                mounted.get_submodule(at)._parameters[last] = known[short]
            else:
                known[short] = value
        return mounted

    def _check(self, folder: Path, decompose: bool, summed: bool, under_fresh: bool) -> None:
        """Raise if an adapter with a separate magnitude (DoRA) would be added to another adapter."""
        if (summed and decompose) or (under_fresh and self.adapter.decompose):
            raise UserError(
                f"{folder}: the magnitude of DoRA belongs to a whole weight, so no other adapter can be added to it",
                fix=f"use LoRA for both adapters (here {key('adapter', 'lora')}), or {SEPARATE}",
            )


def _activate(model: "PeftModel", names: list[str]) -> None:
    """Activate these adapters, one on top of the other; only the trained one gets gradients."""
    model.base_model.set_adapter(names)  # type: ignore[operator,union-attr]
    for path, value in model.named_parameters():
        value.requires_grad_(f".{TRAINED}." in path and TRAINED in names)


def _stored_lora(folder: Path) -> bool:
    """Return whether the adapter at ``folder`` is DoRA; raise UserError if it is not a LoRA adapter."""
    stored = stored_config(folder)
    if stored.get("peft_type") != "LORA" or stored.get("modules_to_save") or stored.get("bias", "none") != "none":
        raise UserError(f"{folder}: only LoRA adapters can share a base", fix=SEPARATE)
    return bool(stored.get("use_dora"))


def _folder(path: str) -> str:
    """Return the model directory of a path given as an input."""
    return str(CausalLM(str(path), None, None).folder)


def stored_head(folder: Path) -> Tensor:
    """Load the [1, D] head of a stored reward model, without reading its other weights.

    Raises:
        UserError: If there is none, or it has several outputs.
    """
    for file in sorted(folder.glob("*.safetensors")):
        with (
            convert_read_errors(folder, option="model.path", part=file.name),
            safe_open(file, framework="pt") as content,
        ):
            if "score.weight" in content.keys():  # noqa: SIM118  # not a mapping
                head = content.get_tensor("score.weight").float()
                if len(head) != 1:
                    raise output_count_error(folder, len(head))
                return head
    raise UserError(
        "is not a reward model: it has no score.weight",
        fix="type a run of stage=reward_model",
        option="model.path",
        value=folder,
    )
