"""What has to run: the steps whose results are really read, in order, each named and checked. Trains nothing.

A single stage is a plan of one step.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra.utils
from omegaconf import DictConfig, OmegaConf

from rlhf import checked, comparison, discovery, hub, model_options, rounds, runs
from rlhf import config as configs
from rlhf.config import Plain
from rlhf.errors import UserError, suggest

NEEDED = ("model", "adapter", "precision", "trainer")  # groups that no stage can do without


@dataclass(frozen=True)
class Step:
    """One run to be made, or found.

    Attributes:
        name: its name in the pipeline; the stage's in a single run.
        stage: the stage's name.
        config: the resolved config, its own root; `round` in it counts the runs of this stage in its lineage, `branch`
            (from 2 on) tells it from steps of the same stage beside it.
        fingerprint: what it computes, 64 hex letters.
        folder: its run folder, which need not exist yet.
        inputs: role -> the identities of what it reads in that role.
        parents: fingerprint -> folder of the runs it reads.
        headline: the metric that a sweep optimises, "" for a stage that names none.
        own: what the pipeline sets on the step itself, in whose keys its name is typed; empty in a single run.
    """

    name: str
    stage: str
    config: Plain
    fingerprint: str
    folder: Path
    inputs: dict[str, list[str]]
    parents: dict[str, Path]
    headline: str
    own: Plain = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What `plan` finds.

    Attributes:
        steps: those to run, in order.
        skipped: step of the pipeline that is left out -> why.
        compare: which two policies to compare at the end, and how; None where one of them is not made.
        notes: what the user should know, one line each.
    """

    steps: list[Step]
    skipped: dict[str, str]
    compare: Plain | None
    notes: list[str]

    def get(self, name: str | None) -> Step | None:
        """The step of that name, if it is to run."""
        return next((step for step in self.steps if step.name == name), None)


def plan(root: DictConfig, overrides: Sequence[str] = (), validate_again: bool = True) -> Plan:
    """What has to run for the last step asked for, in order, every config checked; trains nothing.

    Args:
        root: the composed config of a single run or a pipeline.
        overrides: what was typed, to refuse values that nothing would read.
        validate_again: whether a step that is not finished is validated although the same config passed before.

    Raises:
        UserError: an unknown step, missing inputs, values out of range, an override without effect.
    """
    _check_kinds(root)
    root, repeated = rounds.expand(root)
    names = _step_names(root)
    planner = _Planner(root, names, overrides, validate_again)
    last = None if names is None else _last(names, root.get("until"))
    with runs.sources_read_once():
        planner.add(last)
        compare = planner.comparison()
    notes = _overrides_without_effect(planner, overrides, repeated)
    for choice in _weights_chosen(planner):
        if choice.problem:
            planner.problems.append(choice.problem)
        else:
            notes.append(choice.said)
    if planner.problems:
        raise UserError("\n".join(dict.fromkeys(planner.problems)))
    return Plan(planner.steps, planner.skipped(last), compare, notes)


def _check_kinds(root: DictConfig) -> None:
    """Refuse a pipeline's own keys that are no list or no mapping."""
    for key, is_kind, kind in (
        ("steps", OmegaConf.is_list, "a list of steps"),
        ("repeat", OmegaConf.is_list, "a list of steps"),
        ("compare", OmegaConf.is_dict, "a mapping"),
        ("inputs", OmegaConf.is_dict, "a mapping"),
    ):
        if root.get(key) is not None and not is_kind(root.get(key)):
            raise UserError(f"{key}={root.get(key)}: should be {kind}; leave it out, or take a key below it")


def _step_names(root: DictConfig) -> list[str] | None:
    """The steps of the pipeline; None for a single stage."""
    if root.get("steps") is None:
        if root.get("stage") is None:
            raise UserError("nothing to run: type stage=NAME or pipeline=NAME (rlhf --help lists both)")
        if root.get("until") is not None:
            raise UserError(f"until={root.until} is for pipelines; leave it out, or type pipeline=NAME")
        return None
    if root.get("stage") is not None:
        raise UserError("both a stage and a pipeline are given: type one, or change a step with stage@STEP=NAME")
    names = [str(name) for name in root.steps]
    if not names or len(set(names)) < len(names):
        raise UserError(f"steps={names}: a pipeline lists each of its steps once")
    for name in names:
        _refuse_path("steps", name)
        if root.get(name) is not None and not isinstance(root[name], DictConfig):
            raise UserError(f"{name}={root[name]}: {name} is a step; type stage@{name}={root[name]}")
        for group in discovery.group_names() & set(root.get(name) or ()):
            if isinstance(value := root[name].get(group), str):
                place = name if group == "stage" else f"{name}.{group}"
                raise UserError(f"{name}.{group}={value}: {group} is a group of options; type {group}@{place}={value}")
        if not isinstance(root.get(name), DictConfig) or "stage" not in root[name]:
            raise UserError(f"steps names {name}, but there is no such step: add /stage@{name}: STAGE to its defaults")
    return names


_NOT_RUNS = ("generations", "reports", "sweeps")  # folders of outputs/ that hold other things


def _refuse_path(key: str, name: str) -> None:
    """Refuse a name that is no plain word: it becomes part of paths below the outputs folder, or of their messages."""
    if name in _NOT_RUNS:
        raise UserError(f"{key}={name}: outputs/{name} holds no runs; type another name")
    if re.fullmatch(r"[A-Za-z0-9_-]+", name) is None:
        raise UserError(f"{key}={name}: a name has letters, digits, _ and - alone, since it names a directory")


def _last(names: list[str], until: str | None) -> str:
    if until is None:
        return names[-1]
    if until not in names:
        raise UserError(f"until={until}: no such step{suggest(until, names, 'until=')}")
    return until


class _Planner:
    """Walks from the step asked for to the steps whose results it really reads; gathers all that is wrong."""

    def __init__(
        self, root: DictConfig, names: list[str] | None, overrides: Sequence[str], validate_again: bool
    ) -> None:
        self.root, self.names, self.validate_again = root, names, validate_again
        self.model = next((word[6:] for word in overrides if word.startswith("model=")), "")  # the option, as typed
        self.raw = configs.plain(root)
        self.given = configs.resolve({"inputs": self.raw.get("inputs") or {}})["inputs"]  # at the root
        if root.get("outputs") == "":  # it would be the working directory
            raise UserError("outputs=: names no directory; type outputs=DIRECTORY, or leave it out")
        self.outputs = Path(str(root.get("outputs") or "outputs"))
        self.starts_from_weights = names is not None and configs.names_weights(root)
        self.steps: list[Step] = []
        self.problems: list[str] = []
        self.roles: dict[str, set[str]] = {}  # step -> roles it reads
        self.roles_of_root: dict[str, set[str]] = {}  # step -> those it reads of the root's inputs
        self.unread: dict[str, set[str]] = {}  # step -> shared groups that its stage does not ask for
        self._begun: set[str | None] = set()
        self._by_name: dict[str, Step] = {}
        self._lineage: dict[str, dict[str, str]] = {}  # step's fingerprint -> stages of its ancestors and of itself

    def add(self, name: str | None) -> None:
        """Plans a step, after everything it needs."""
        if name in self._by_name:
            return
        if name in self._begun:
            raise UserError(f"the steps need each other in a circle, at {name}: change {name}.inputs")
        self._begun.add(name)
        raw = configs.step_config(self.raw, name)
        roles = configs.roles_read(raw)
        # What is not read is neither resolved nor part of the run's name, and makes no step necessary.
        raw["inputs"] = {role: value if role in roles else None for role, value in (raw.get("inputs") or {}).items()}
        for resolver, needed in configs.steps_named(raw):
            if resolver != "artifact" and self.starts_from_weights:
                continue
            if needed not in (self.names or ()):
                hint = suggest(needed, self.names or ())
                raise UserError(f"{name or 'the config'} reads the step {needed}, which does not exist{hint}")
            self.add(needed)
        step = self._made(name, raw, roles)
        self._by_name[step.name if name is None else name] = step
        self.steps.append(step)

    def _made(self, name: str | None, raw: Plain, roles: set[str]) -> Step:
        own = self.raw[name] if name else {}
        before = len(self.problems)
        with configs.scope(self.root, {key: step.folder for key, step in self._by_name.items()}):
            inputs, identities, parents = self._inputs(name, raw, roles)
            raw["inputs"] |= inputs
            known = checked.key(raw, own, name or "")
            facts = checked.read(known) if len(self.problems) == before else None
            made = None
            if facts is not None:
                made = self._step(name, raw, configs.resolve(raw), roles, identities, parents, facts)
                if not self.validate_again or runs.Run(made.folder).finished:
                    return made
            return self._validated(name, raw, roles, identities, parents, known, len(self.problems) > before, made)

    def _validated(
        self,
        name: str | None,
        raw: Plain,
        roles: set[str],
        identities: dict[str, list[str]],
        parents: dict[str, Path],
        known: str,
        broken: bool,
        made: Step | None,
    ) -> Step:
        """The step (``made``, where the config passed before), its config validated, remembered under ``known``."""
        from rlhf import adapted_layers, buildable, context, sharing, validation

        own = self.raw[name] if name else {}
        lost = [group for group in NEEDED if not isinstance(raw.get(group), dict)]
        if lost:
            raise UserError(f"{lost[0]}: has no value, and every stage needs it; type {lost[0]}=OPTION")
        try:
            validation.check(OmegaConf.create(raw), name or "", own)
        except UserError as error:
            self.problems += str(error).splitlines()
            broken = True
        if broken:  # No folder can be named; the walk goes on only to find what else is wrong.
            stage = _stage_name(raw)
            self.roles[name or stage], self.unread[name or stage] = roles, set()
            folder = self.outputs / stage / f"({name or stage})"
            return Step(name or stage, stage, raw, "", folder, identities, parents, "", own)
        facts = None
        if made is None:
            config = configs.resolve(raw)
            facts = _facts(config)
            made = self._step(name, raw, config, roles, identities, parents, facts)
        sound = True
        for one in (buildable, adapted_layers, sharing, context):
            try:
                one.check(made, self.steps)
            except UserError as error:
                self.problems.append(configs.said_of_step(str(error), own, made.name))
                sound = False
        if sound and facts is not None:
            checked.write(known, facts)
        return made

    def _step(
        self,
        name: str | None,
        raw: Plain,
        config: Plain,
        roles: set[str],
        identities: dict[str, list[str]],
        parents: dict[str, Path],
        facts: checked.Facts,
    ) -> Step:
        """The step of a resolved config, with its fingerprint."""
        stage = _stage_name(config)
        _refuse_path(f"{name}.stage.name" if name else "stage.name", stage)
        own_name = name or stage
        self.roles[own_name], self.unread[own_name] = roles, set(facts.unread)
        config = {key: value for key, value in config.items() if key not in facts.unread}
        for _, needed in configs.steps_named({key: value for key, value in raw.items() if key != "inputs"}):
            if needed in self._by_name:
                parents = parents | {self._by_name[needed].fingerprint: self._by_name[needed].folder}
        ancestors = self._ancestors(parents)
        config["round"] = 1 + list(ancestors.values()).count(stage)
        if (branch := 1 + self._beside(name, stage, ancestors)) > 1:
            config["branch"] = branch
        planned = {str(folder): identity for identity, folder in parents.items()}
        try:
            fingerprint = runs.fingerprint(config, identities, planned, facts.digests)
        except UserError as error:
            raise UserError(f"{name}.{error}" if name and ".source=" in str(error) else str(error)) from None
        self._lineage[fingerprint] = {**ancestors, fingerprint: stage}
        folder = self.outputs / stage / fingerprint[: runs.LETTERS]
        own = self.raw[name] if name else {}
        return Step(own_name, stage, config, fingerprint, folder, identities, parents, facts.headline, own)

    def _beside(self, name: str | None, stage: str, ancestors: Mapping[str, str]) -> int:
        """Count the steps of the same stage that the pipeline lists before this one and that it does not come from."""
        names = self.names or []
        if name is None:
            return 0
        before = [one for one in names[: names.index(name)] if _stage_name(self.raw[one]) == stage]
        planned = {one: self._by_name[one].fingerprint for one in before if one in self._by_name}
        return sum(planned.get(one) not in ancestors for one in before)

    def _inputs(
        self, name: str | None, raw: Plain, roles: set[str]
    ) -> tuple[Plain, dict[str, list[str]], dict[str, Path]]:
        """Of the roles read: the paths for the config, the identities, and the runs among them."""
        values = configs.resolve({**raw, **{k: None for k in raw if k != "inputs"}})["inputs"]
        required = configs.required_roles(raw)
        prefix = f"{name}." if name else ""
        paths: Plain = {}
        identities: dict[str, list[str]] = {}
        parents: dict[str, Path] = {}
        for role in sorted(roles):
            value, key = values.get(role), f"{prefix}inputs.{role}"
            if value is None or value == self.given.get(role):
                value, key = self.given.get(role), f"inputs.{role}"
                if value is not None:
                    self.roles_of_root.setdefault(name or "", set()).add(role)
            if value is None:
                if role in required:
                    self.problems.append(
                        f"{prefix}inputs.{role}: no value, and {prefix}{required[role]} reads it; "
                        f"type {prefix}inputs.{role}={self._instead(role)}"
                    )
                    paths[role] = "RUN"  # so that the rest of the config can still be checked
                continue
            found = []
            for one in value if isinstance(value, list) else [value]:
                try:
                    found.append(self._reference(str(one), role, key))
                except UserError as error:
                    self.problems.append(str(error))
                    found.append(runs.Reference(str(one), ""))
            paths[role] = [one.path for one in found] if isinstance(value, list) else found[0].path
            identities[role] = [one.identity for one in found]
            for one in found:
                if one.run is not None:
                    made = next((step for step in self.steps if step.folder == one.run), None)
                    parents[made.fingerprint if made else runs.Run(one.run).fingerprint] = one.run
        return paths, identities, parents

    def _ancestors(self, parents: Mapping[str, Path]) -> dict[str, str]:
        """Return fingerprint -> stage of every run that these runs come from, themselves included."""
        found: dict[str, str] = {}
        for fingerprint, folder in parents.items():
            if fingerprint in self._lineage:
                found |= self._lineage[fingerprint]
            else:
                lineage = runs.Run(folder).lineage
                earlier = lineage.get("ancestors") or {}
                found |= {name: str(run.get("stage")) for name, run in earlier.items()}
                found[fingerprint] = str(lineage.get("stage") or folder.parent.name)
        return found

    def _instead(self, role: str) -> str:
        """What to type for an input that is not given."""
        if role == "policy" and self.model in model_options.with_weights():
            return (
                f"{self.model} to start from the weights of model={self.model}, or RUN (a run folder or a fingerprint)"
            )
        return "RUN (a run folder, a fingerprint, a model folder or a hub id)"

    def _reference(self, value: str, role: str, key: str) -> runs.Reference:
        for step in self.steps:
            if value == str(step.folder):  # it need not exist yet
                return runs.Reference(runs.input_path(step.folder, role), step.fingerprint, step.folder)
        return runs.resolve(value, role, self.outputs, key)

    def skipped(self, last: str | None) -> dict[str, str]:
        """Why steps of the pipeline are left out."""
        names = self.names or []
        reasons = {}
        for name in names:
            if name in self._by_name:
                continue
            if last is not None and names.index(name) > names.index(last):
                reasons[name] = f"after until={last}"
            elif self.starts_from_weights and name == names[0]:
                reasons[name] = "not needed, the model has weights"
            else:
                reasons[name] = "not needed, no step that runs reads it"
        return reasons

    def comparison(self) -> Plain | None:
        """The pipeline's `compare`, checked; None where one of its two policies is not made."""
        node = self.root.get("compare")
        if node is None or self.names is None:
            return None
        own = configs.resolve({"compare": OmegaConf.to_container(node)})["compare"]
        made = all(own.get(key) in self._by_name for key in ("before", "after"))
        folders = {step.name: str(step.folder) for step in self.steps}
        known = checked.key({"compare": own}, {"steps": self.names, "folders": folders}, "compare")
        new = checked.read(known) is None
        problems = self._problems_of_comparison(own, made) if new else []
        if not problems and made:
            try:
                comparison.data_digests(own)
            except UserError as error:
                problems.append(str(error))
        if not problems and new:
            checked.write(known, checked.Facts())
        self.problems += problems
        return own if made else None

    def _problems_of_comparison(self, own: Plain, made: bool) -> list[str]:
        from rlhf import context, evaluation, validation

        given = ("before", "after", "reward_model", "prompts", "text", "folder")
        problems = [
            f"compare.{key}={own[key]}: no such step{suggest(str(own[key]), self.names or ())}"
            for key in ("before", "after", "reward_model")
            if own.get(key) is not None and own[key] not in (self.names or ())
        ]
        problems += validation.check_node(evaluation.compare, own, "compare", given=given, ignore=(*given, "data"))
        for data in ("data", *(["text"] if own.get("text") else [])):
            try:
                validation.check(OmegaConf.create({data: own.get(data)}), "compare")
            except UserError as error:
                problems += str(error).splitlines()
        if made:
            try:
                context.check_comparison(own, self.steps)
            except UserError as error:
                problems.append(str(error))
        return problems


def _stage_name(config: Plain) -> str:
    stage = config["stage"] if isinstance(config["stage"], dict) else {}
    return str(stage.get("name") or str(stage.get("_target_", "stage")).partition(".")[0].removeprefix("rlhf_"))


def _facts(config: Plain) -> checked.Facts:
    """What planning needs of the classes of a resolved config; imports them."""
    from rlhf import validation

    stage = hydra.utils.get_object(config["stage"]["_target_"])
    # Groups that every step inherits and that this one's stage does not ask for: no part of what it computes.
    unread = {"optimizer", "scheduler"} - set(validation.groups(stage))
    relevant = {key: value for key, value in config.items() if key not in unread}
    headline = str(getattr(stage, "headline", "") or "")
    return checked.Facts(tuple(sorted(unread)), headline, runs.keys_with_digest(relevant))


def _weights_chosen(planner: _Planner) -> list[hub.Choice]:
    """Of the models that the hub or a package can give: those that a step of the plan starts from or reads."""
    used = {value for step in planner.steps for key in ("model", "inputs") for value in _texts(step.config.get(key))}
    return [choice for choice in hub.chosen() if choice.path in used]


def _texts(node: Any) -> set[str]:
    return {value for _, value in configs.leaves(node or {}) if isinstance(value, str)}


def _overrides_without_effect(
    planner: _Planner, overrides: Sequence[str], repeated: Mapping[str, Sequence[str]]
) -> list[str]:
    """A typed value that no step reads is a problem; one for a step that does not run gets a note (returned)."""
    running = [step.name for step in planner.steps]
    notes = []
    for typed in overrides:
        key, _, value = typed.lstrip("+").partition("=")
        if typed.startswith("+") and "@" not in key and (nobodys := _read_by_nobody(planner, key, repeated)):
            planner.problems.append(f"{typed} has no effect: nothing reads {nobodys}; leave it out")
            continue
        if typed.startswith("~") or "@" in key or value in ("null", ""):
            continue
        first, _, rest = key.partition(".")
        if planner.names is not None and (first in repeated or first in planner.names):
            # What is typed for a repeated step is for all its rounds; it has an effect if any of them reads it.
            meant = [name for name in repeated.get(first, [first]) if name in running]
            role = rest.removeprefix("inputs.") if rest.startswith("inputs.") else None
            if not meant:
                notes.append(f"{typed} is not used: the step {first} does not run")
            elif all(rest.partition(".")[0] in planner.unread[name] for name in meant):
                planner.problems.append(
                    f"{typed} has no effect: the stage of {first} does not read {rest.partition('.')[0]}"
                )
            elif role is not None and all(role not in planner.roles[name] for name in meant):
                planner.problems.append(f"{typed} has no effect: {_reads(planner, meant[0])}")
        elif first == "inputs" and rest:
            readers = planner.roles if planner.names is None else planner.roles_of_root
            if not any(rest in roles for roles in readers.values()):
                keys = [f"{name}.{key}" for name in running if planner.names and rest in planner.roles[name]]
                instead = f"type {' or '.join(keys)}" if keys else "; ".join(_reads(planner, name) for name in running)
                planner.problems.append(f"{typed} has no effect: {instead}")
        else:
            readers_of = [name for name in running if first not in planner.unread[name]]
            if not readers_of:
                planner.problems.append(f"{typed} has no effect: no stage of this run reads {first}")
            elif planner.names is not None and all(configs.sets(planner.raw[name], key) for name in readers_of):
                instead = ", ".join(f"{name}.{key}" for name in readers_of)
                planner.problems.append(f"{typed} has no effect: every step sets its own; type one of {instead}")
    return notes


def _read_by_nobody(planner: _Planner, typed: str, repeated: Mapping[str, Sequence[str]]) -> str | None:
    """Return the key at the root of a config, a step's or the whole one's, that a + adds and nobody reads.

    It is no group, no step and no object, and no value names it.
    """
    from rlhf import validation

    step, _, below = typed.partition(".")
    if below and (step in repeated or step in (planner.names or ())):  # a step's config is its own root
        key, path, own = below.partition(".")[0], f"{step}.", planner.raw[repeated.get(step, [step])[0]]
        known = validation.root_keys()
    else:
        key, path, own = step, "", planner.raw
        known = {*validation.root_keys(), *repeated, *(planner.names or ()), "compare", "repeat", "rounds"}
    added = own.get(key)
    if key in known or isinstance(added, dict) and "_target_" in added:
        return None
    mention = re.compile(r"\$\{" + re.escape(key) + r"[.}\[]")
    named = any(isinstance(value, str) and mention.search(value) for _, value in configs.leaves(planner.raw))
    return None if named else f"{path}{key}"


def _reads(planner: _Planner, name: str) -> str:
    step = next(step for step in planner.steps if step.name == name)
    roles = ", ".join(sorted(planner.roles[name])) or "no input"
    return f"stage={step.stage} reads {roles}"
