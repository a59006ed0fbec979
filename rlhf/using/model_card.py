"""Model card: the README.md of an exported model, with loading code, lineage, metrics and licences.

This module imports no torch.
"""

import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rlhf.console import number
from rlhf.runs.run_directory import Run
from rlhf.storage.plain import Plain
from rlhf.using import eval_file, markdown, named
from rlhf.using.export import Exported
from rlhf.using.named import Named

# Config groups that determine the model; the others set places and terminal output.
HYPERPARAMETERS = ("stage", "objective", "model", "adapter", "precision", "optimizer", "scheduler", "sampler", "reward",
         "annotator", "seed")  # fmt: skip

BUILT_IN = ("testbed", "arithmetic")

POLICY = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {folder}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
"""
ADAPTER = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig

folder = {folder}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="auto")  # on top of {base}
model.generation_config = GenerationConfig.from_pretrained(folder)
"""
ON_GGUF = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

folder = {folder}
tokenizer = AutoTokenizer.from_pretrained(folder)
base = AutoModelForCausalLM.from_pretrained({parent}, gguf_file={name}, dtype="float32")
model = PeftModel.from_pretrained(base, folder)
model.generation_config = GenerationConfig.from_pretrained(folder)
"""
ON_PACKAGE = """from importlib.util import find_spec

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

folder = {folder}
tokenizer = AutoTokenizer.from_pretrained(folder)
(package,) = find_spec({module}).submodule_search_locations  # {install}
base = AutoModelForCausalLM.from_pretrained(package, gguf_file={name}, dtype="float32")
model = PeftModel.from_pretrained(base, folder)
model.generation_config = GenerationConfig.from_pretrained(folder)
"""
RESPONSE = """
dialogue = [{"role": "user", "content": "Hello"}]
prompt = tokenizer.apply_chat_template(dialogue, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**prompt, max_new_tokens=64, do_sample=False)
response = output[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(response, skip_special_tokens=True))
"""
REWARD = """import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = {folder}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto")

dialogue = [{{"role": "user", "content": "Hello"}}, {{"role": "assistant", "content": "Hello. How can I help?"}}]
ids = tokenizer.apply_chat_template(dialogue, return_tensors="pt", return_dict=True)["input_ids"]
end = (ids[0] == {end}).nonzero()[-1].item()  # the score is read at the last end of turn, whatever comes after it
with torch.no_grad():
    score = model(input_ids=ids[:, : end + 1]).logits[0, 0].item() + {bias!r}
print(score)
"""

FLOAT32 = (
    "in float32 greedy responses are those of `rlhf chat` and `rlhf generate` at temperature 0; in bfloat16 another "
    "token may be chosen where two are almost equally likely"
)


def card(model: Named, exported: Exported, end_id: int | None, licence: str | None, command: str) -> str:
    """Return the text of the card.

    Args:
        model: The exported model.
        exported: Description of the export.
        end_id: The end-of-turn token id, for reward models.
        licence: Identifier of the licence, as the hub writes it; None: unknown.
        command: The typed command.
    """
    parts: list[str | None] = [
        _front(model, exported, licence),
        f"# {markdown.plain(exported.folder.name)}\n",
        _what(model, exported),
    ]
    parts += ["## Load it\n", f"{markdown.block(_code(exported, end_id), 'python')}\n"]
    notes = [*exported.notes, FLOAT32] if exported.kind != "reward_model" else exported.notes
    parts += [*(f"- {markdown.line(note).replace('<', '&lt;')}" for note in notes), ""]
    if model.run is not None:
        parts += [_lineage(model.run), _metrics(model.run), _evaluations(model.run)]
    parts.append(_licence(licence, model))
    parts.append(f"Written by {markdown.code(command)}.\n")
    return "\n".join(part for part in parts if part is not None)


def _front(model: Named, exported: Exported, licence: str | None) -> str:
    """Return the YAML front matter that the hub reads."""
    content: Plain = {
        "license": markdown.line(licence or "unknown"),
        "library_name": "peft" if exported.kind == "adapter" else "transformers",
        "pipeline_tag": "text-classification" if exported.kind == "reward_model" else "text-generation",
        "tags": [
            "rlhf",
            *([markdown.line(model.run.stage)] if model.run else []),
            *(["lora"] if exported.kind == "adapter" else []),
        ],
    }
    root = exported.base if exported.kind == "adapter" else _root(model)
    if root is not None and _hub_id(root):
        content["base_model"] = root
    return f"---\n{OmegaConf.to_yaml(OmegaConf.create(content))}---\n"


def _what(model: Named, exported: Exported) -> str:
    base = markdown.plain(exported.source) if exported.source else markdown.code(exported.base)
    kinds = {
        "model": "A causal language model with all its weights.",
        "adapter": f"A LoRA adapter (PEFT) for {base}.",
        "reward_model": "A reward model: one number for a dialogue, higher for better responses.",
    }
    origin = f"the model {markdown.code(model.ref)}"
    if model.run is not None:
        origin = f"stage {markdown.code(model.run.stage)}, run {markdown.code(model.run.folder)}"
    return f"{kinds[exported.kind]} Exported from {origin}.\n"


def _code(exported: Exported, end_id: int | None) -> str:
    folder = markdown.literal(exported.folder.name)
    if exported.kind == "reward_model":
        return REWARD.format(folder=folder, end=end_id, bias=exported.bias)
    if exported.kind == "model":
        return POLICY.format(folder=folder) + RESPONSE
    base, source = str(exported.base), exported.source
    if source is not None and source.package:
        name, module = markdown.literal(Path(source.path).name), markdown.literal(str(source.module))
        install = markdown.line(source.install)
        return ON_PACKAGE.format(folder=folder, module=module, name=name, install=install) + RESPONSE
    if base.endswith(".gguf"):
        return (
            ON_GGUF.format(
                folder=folder, parent=markdown.literal(str(Path(base).parent)), name=markdown.literal(Path(base).name)
            )
            + RESPONSE
        )
    return ADAPTER.format(folder=folder, base=markdown.line(base)) + RESPONSE


def _lineage(run: Run) -> str:
    """Return a section on every ancestor, oldest first, and the run itself: inputs, command line, hyperparameters."""
    chain = [*named.ancestors(run), run]
    names = {one.fingerprint: f"{markdown.plain(one.stage)} {markdown.code(one.folder.name)}" for one in chain}
    lines = ["## Lineage\n", "| run | made from | data |", "|---|---|---|"]
    for one in chain:
        inputs = one.lineage.get("inputs", {})
        paths = _config(one).get("inputs") or {}
        made = [
            f"{markdown.plain(role)}: {_input_name(str(name), names, paths.get(role))}"
            for role, found in inputs.items()
            for name in found
        ]
        lines.append(markdown.row(names[one.fingerprint], ", ".join(made) or _start(one), markdown.plain(_data(one))))
    for one in chain:
        lines += ["", f"### {names[one.fingerprint]}\n"]
        if not (one.folder / "config.yaml").is_file():
            lines.append(f"Its directory, {markdown.code(one.folder)}, no longer exists.")
            continue
        lines += [
            markdown.block(str(one.status_file.get("command", ""))),
            "",
            markdown.block(_hyperparameters(one), "yaml"),
        ]
    versions = run.summary.get("versions", {})
    if versions:
        lines += [
            "",
            "Made with " + ", ".join(markdown.plain(f"{name} {version}") for name, version in versions.items()) + ".",
        ]
    return "\n".join(lines) + "\n"


def _input_name(identity: str, names: dict[str, str], path: Any) -> str:
    """Return the name of an input: its run's if a run made it; else the hub id, or the only path that was read."""
    if identity.startswith("hub:"):
        return markdown.plain(identity)
    digest = markdown.code(identity[:20])
    return names.get(
        identity.partition("/")[0], f"{markdown.code(path)} ({digest})" if isinstance(path, str) else digest
    )


def _start(run: Run) -> str:
    path = (_config(run).get("model") or {}).get("path")
    return "random weights" if path is None else markdown.code(path)


def _data(run: Run) -> str:
    found = []
    for node in _sources(_config(run).get("data")):
        size = "" if node.get("size") is None else f", {node['size']} records"
        source = node["source"] if isinstance(node["source"], str) else ", ".join(map(str, node["source"]))
        found.append(f"{node.get('record', 'data')}s of {source}{size}")
    return "; ".join(found) or "-"


def _sources(node: Any) -> list[Plain]:
    if not isinstance(node, dict):
        return []
    own = [node] if "source" in node else []
    return own + [found for value in node.values() for found in _sources(value)]


def _hyperparameters(run: Run) -> str:
    config = _config(run)
    return OmegaConf.to_yaml(
        OmegaConf.create({key: config[key] for key in (*HYPERPARAMETERS, "data") if key in config})
    )


def _metrics(run: Run) -> str | None:
    if not run.metrics:
        return None
    lines = ["## Metrics at the end of training\n", "| metric | value |", "|---|---|"]
    return (
        "\n".join(
            [
                *lines,
                *(markdown.row(markdown.plain(k), markdown.plain(number(v))) for k, v in sorted(run.metrics.items())),
            ]
        )
        + "\n"
    )


def _evaluations(run: Run) -> str | None:
    """Return a section with the results of `rlhf eval`; None without any."""
    parts = []
    for one in eval_file.read(run.folder / eval_file.FILE):
        settings = {key: value for key, value in one["settings"].items() if value is not None and key != "run"}
        parts += [", ".join(markdown.plain(f"{key}: {value}") for key, value in settings.items()) + "\n"]
        parts += ["| metric | mean ± standard error |", "|---|---|"]
        for name, value in one["metrics"].items():
            label = markdown.plain(eval_file.LABELS.get(name, name))
            parts.append(markdown.row(label, markdown.plain(f"{number(value['mean'])} ± {number(value['se'])}")))
        parts.append("")
    return "\n".join(["## Evaluations (`rlhf eval`)\n", *parts]) if parts else None


def _licence(licence: str | None, model: Named) -> str:
    """Return a section on the licences to check before the model is distributed: its own, and those it depends on."""
    root = _root(model)
    rows = [("this model", markdown.plain(licence) if licence else "unknown; `rlhf export --license ID` sets it")]
    if root is not None:
        rows.append((f"the weights it started from, {markdown.code(root)}", "to be looked up"))
    chain = [] if model.run is None else [*named.ancestors(model.run), model.run]
    sources = {str(node["source"]) for one in chain for node in _sources(_config(one).get("data"))}
    made = {str(one.folder) for one in chain}
    for source in sorted(sources - made):
        rows.append((f"the data {markdown.code(source)}", "part of rlhf" if source in BUILT_IN else "to be looked up"))
    return "\n".join(["## Licence\n", "| of | licence |", "|---|---|", *(markdown.row(*one) for one in rows)]) + "\n"


def _root(model: Named) -> str | None:
    """Return the weights at the start of the lineage; None if they were random."""
    if model.run is None:
        return model.path
    for one in [*named.ancestors(model.run), model.run]:
        path = (_config(one).get("model") or {}).get("path")
        inside = path is not None and any(str(path).startswith(str(a.folder)) for a in named.ancestors(model.run))
        if path is not None and not inside:
            return str(path)
    return None


def _hub_id(path: str) -> bool:
    return re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", path) is not None and not Path(path).exists()


def _config(run: Run) -> Plain:
    return run.plain_config
