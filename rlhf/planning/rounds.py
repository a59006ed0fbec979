"""Expansion of the steps that a pipeline repeats.

``repeat: [collect, reward_model]`` and ``rounds: 3`` become collect_1, reward_model_1, collect_2, ..., each an ordinary
step. A value set on ``collect`` holds in every round, a value set on ``collect_2`` in that round only. The resolver
of a reference between steps selects the rounds:

- ``${artifact:STEP}``: in a repeated step the STEP of the same round; anywhere else STEP's last round.
- ``${previous_round:STEP,FIRST}``: the STEP of the previous round; in the first round the step FIRST, or null.
- ``${all_rounds:STEP}``: a list, STEP of every round up to this one.
- ``${earlier_rounds:STEP}``: a list, STEP of every round before this one; null in the first.

This module imports no torch.
"""

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf import discovery
from rlhf.errors import UserError, suggest
from rlhf.storage.plain import Plain, merge, plain

_REFERENCE = re.compile(r"\$\{(artifact|base_model|base_weights|previous_round|all_rounds|earlier_rounds):([^${}]*)\}")
MOST = 100  # rounds; Llama 2 used five
_LISTS = ("all_rounds", "earlier_rounds")
_NUMBERED = re.compile(r"(.+)_(\d+)$")
_TYPED = re.compile(r"(\w+?)_\d+(\.[^=]*)?=")  # collect_2.sampler.samples=4
_TYPED_GROUP = re.compile(r"[\w/]+@(\w+?)_\d+(\.[^=]*)?=")  # annotator@collect_2.annotator=reward


def expand(root: DictConfig) -> tuple[DictConfig, dict[str, list[str]]]:
    """Return the config with every repeated step written out, and a map from each repeated step to its names by round.

    A config without ``repeat`` is returned unchanged, with an empty map.

    Raises:
        UserError: The number of rounds is not a whole number from 1 to `MOST`, or a repeated step or a round that the
            config names does not exist.
    """
    if root.get("steps") is None or not root.get("repeat"):
        stray = [str(key) for key in root if (match := _NUMBERED.match(str(key))) and match[1] in _repeated_anywhere()]
        if stray:
            problem = "is a round of a step, and this config repeats no step"
            raise UserError(problem, fix="leave it out, or type a pipeline that has rounds", option=stray[0])
        return root, {}
    everything = plain(root)
    repeated = [str(name) for name in everything["repeat"]]
    count = everything.get("rounds", 1)
    if type(count) is not int or not 1 <= count <= MOST:
        problem = f"must be a whole number from 1 to {MOST}"
        raise UserError(problem, fix="type rounds=3", option="rounds", value=count)
    steps = [str(name) for name in everything["steps"]]
    for name in repeated:
        if name not in steps or not isinstance(everything.get(name), dict):
            raise UserError(f"names {name}, which is not a step{suggest(name, steps)}", option="repeat")
    names = {name: [f"{name}_{index}" for index in range(1, count + 1)] for name in repeated}
    for key in everything:
        match = _NUMBERED.match(key)
        if match and match[1] in names and key not in names[match[1]]:
            fix = f"type {names[match[1]][-1]} or rounds={match[2]}"
            raise UserError(f"no such round, rounds={count}", fix=fix, option=key)

    made: Plain = {}
    for key, node in everything.items():
        if key in names:
            for index, name in enumerate(names[key], 1):
                own = _refer_to_rounds(_merge_round(node, everything.get(name) or {}), names, index, name)
                made[name] = own
        elif not any(key in of_step for of_step in names.values()):
            made[key] = _refer_to_rounds(node, names, None, key)
    first = min(steps.index(name) for name in repeated)
    in_turn = [names[name][index] for index in range(count) for name in steps if name in names]
    others = [(index < first, name) for index, name in enumerate(steps) if name not in names]
    made["steps"] = [name for early, name in others if early] + in_turn + [name for early, name in others if not early]
    made["until"] = _last_round(made.get("until"), names)
    compare = made.get("compare")
    if isinstance(compare, dict):
        made["compare"] = {
            key: _last_round(value, names) if key in ("before", "after", "reward_model") else value
            for key, value in compare.items()
        }
    return OmegaConf.create(made), names


def _merge_round(template: Plain, own: Plain) -> Plain:
    """Return a repeated step merged with the settings of one round.

    If the round sets another stage, that stage brings its own groups and only the inputs of the repeated step are kept.
    """
    other_stage = isinstance(own.get("stage"), dict) and "_target_" in own["stage"]
    return merge({"inputs": template.get("inputs") or {}} if other_stage else template, own)


def _last_round(name: Any, names: dict[str, list[str]]) -> Any:
    return names[name][-1] if name in names else name


def _refer_to_rounds(node: Any, names: dict[str, list[str]], index: int | None, where: str) -> Any:
    """Return ``node`` with references to repeated steps replaced by references to the steps of a round.

    Args:
        node: Any part of the config.
        names: Repeated step -> its names by round.
        index: Round of the step that holds the node, from 1; None for a step that is not repeated.
        where: Name of that step or key, for error messages.
    """
    if isinstance(node, dict):
        return {key: _refer_to_rounds(value, names, index, where) for key, value in node.items()}
    if isinstance(node, list):
        return [_refer_to_rounds(value, names, index, where) for value in node]
    if not isinstance(node, str):
        return node
    whole = _REFERENCE.fullmatch(node)
    if whole and whole[1] in _LISTS:
        of_step = _rounds_of(whole, names, where)
        upto = len(of_step) if index is None else index if whole[1] == "all_rounds" else index - 1
        return [f"${{artifact:{name}}}" for name in of_step[:upto]] or None
    if whole and whole[1] == "previous_round":
        of_step, first = _rounds_of(whole, names, where), whole[2].partition(",")[2].strip()
        if index is None:
            instead = f"${{artifact:{whole[2].partition(',')[0]}}}"
            raise UserError(f"reads {node}, which only a repeated step can read", fix=f"type {instead}", where=where)
        name = of_step[index - 2] if index > 1 else first
        return f"${{artifact:{name}}}" if name else None

    def one(match: re.Match[str]) -> str:
        if match[1] in (*_LISTS, "previous_round"):
            problem = f"{match[0]} must be a whole value and cannot be a part of {node}"
            raise UserError(problem, fix=f"type {match[0]} alone", where=where)
        of_step = names.get(match[2].strip())
        if of_step is None:
            return match[0]
        return f"${{{match[1]}:{of_step[-1 if index is None else index - 1]}}}"

    return _REFERENCE.sub(one, node)


def _rounds_of(match: re.Match[str], names: dict[str, list[str]], where: str) -> list[str]:
    step = match[2].partition(",")[0].strip()
    if step not in names:
        raise UserError(f"reads {match[0]}, but {step} is not repeated{suggest(step, names)}", where=where)
    return names[step]


def mark_round_overrides(words: list[str]) -> list[str]:
    """Return the command line with Hydra's ``++`` or ``+`` before overrides of a single round.

    Hydra composes only the repeated step, so that a key such as collect_2 is new to it.
    """
    names = _repeated_anywhere() if any(_TYPED.match(w) or _TYPED_GROUP.match(w) for w in words) else set()

    def marked(word: str) -> str:
        if (value := _TYPED.match(word)) and value[1] in names:
            return f"++{word}"
        if (group := _TYPED_GROUP.match(word)) and group[1] in names:
            return f"+{word}"
        return word

    return [marked(word) for word in words]


def _repeated_anywhere() -> set[str]:
    """Return the names of the steps that any installed pipeline repeats."""
    return {str(name) for pipeline in _pipelines() for name in pipeline.get("repeat") or ()}


def _pipelines() -> Iterator[DictConfig]:
    for path in discovery.named("pipeline"):
        content = OmegaConf.load(path)
        if isinstance(content, DictConfig):
            yield content
