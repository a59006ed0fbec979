"""Report as one self-contained HTML file: tables, plots, family tree, responses, and every config."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rlhf.report import plots
from rlhf.report.members import COSTS, Member
from rlhf.report.sweep import Comparison, cell, short_names, show
from rlhf.report.tree import family_tree
from rlhf.runs import run_files

_CSS = """
:root { --ink: #1f2933; --soft: #616e7c; --line: #e4e7eb; --mark: #0072B2; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); background: #fff;
  max-width: 1120px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { padding: .38rem .8rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { border-bottom: 2px solid #cbd2d9; cursor: pointer; font-weight: 600; }
th.hyperparameter { color: var(--mark); } td.num { text-align: right; } td.best \
{ font-weight: 700; background: #eaf4ee; }
td.wrap { white-space: normal; min-width: 13rem; max-width: 30rem; }
tbody tr:hover { background: #f7f9fb; } .bad { color: #b42318; }
img { max-width: 100%; display: block; }
details { margin: .4rem 0; } summary { cursor: pointer; color: var(--mark); }
pre { background: #f5f7fa; padding: .8rem; overflow-x: auto; font-size: .8rem; border-radius: 6px; }
code { font-size: .88em; background: #f5f7fa; padding: .1em .3em; border-radius: 4px; }
"""
# A click on a column's head sorts by the column; a second click reverses the order.
_JS = """
document.querySelectorAll('table.sort').forEach(t => t.tHead.querySelectorAll('th').forEach((h, i) => h.onclick = () =>
{
  const up = h.dataset.up = h.dataset.up === '1' ? '0' : '1', cell = r => r.cells[i].dataset.v ?? r.cells[i].innerText;
  [...t.tBodies[0].rows].sort((a, b) => { const x = cell(a), y = cell(b), n = x - y;
    return (isNaN(n) || x === '' || y === '' ? x.localeCompare(y) : n) * (up === '1' ? 1 : -1); })
    .forEach(r => t.tBodies[0].append(r)); }));
"""


@dataclass(frozen=True)
class Failure:
    """Job of a sweep that did not finish."""

    job: str
    status: str
    error: str


def failures(folder: Path) -> list[Failure]:
    """Return the unfinished jobs in the results.csv of a sweep directory; empty without such a file."""
    path = folder / "results.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if "job" in row and row.get("status") not in (None, "", "finished")]
    known = {"job", "status", "value", "seconds", "run", "error"}
    found = []
    for row in rows:
        varied = " ".join(f"{k}={v}" for k, v in row.items() if k not in known and "." in k and v)
        found.append(Failure(f"{row['job']} {varied}".strip(), str(row["status"]), row.get("error") or ""))
    return found


def write_report(comparison: Comparison, path: Path, title: str, failed: Sequence[Failure] = ()) -> Path:
    """Write the report of a comparison as one HTML file; return its path."""
    shown = comparison.main_metrics(8)
    logged = [name for name in shown if any(name in member.series for member in comparison.members)]
    every = {name for member in comparison.members for name in member.metrics} - set(COSTS)
    more = len(every - set(shown))
    note = f"<p class=soft>{len(shown)} of {len(every)} metrics; all are in report.csv.</p>" if more else ""
    left_out = "".join(f"<p class=bad>{escape(line)}</p>" for line in comparison.left_out(shown))
    sections = [
        f"<h1>{escape(title)}</h1><p class=soft>{_summary(comparison)}</p>",
        _failed(failed),
        f"<h2>Results</h2>{_results(comparison, shown)}{note}{left_out}",
    ]
    if effects := plots.effects(comparison, comparison.distinct(3)) if shown and len(comparison.groups) > 1 else "":
        sections.append(
            f"<h2>What the swept hyperparameters do</h2>{_image(effects, 'final metrics by hyperparameter')}"
        )
    names = plots.reward_and_kl_names(comparison)
    if names and (frontier := plots.frontier(comparison, *names)):
        sections.append(
            "<h2>Reward against KL</h2><p class=soft>Up and to the left is better: more reward for the same distance "
            f"from the reference. Thin lines: the path of training.</p>{_image(frontier, 'reward against KL')}"
        )
    if logged:
        bands = " Bands and bars: one standard error over seeds." if comparison.seeds > 1 else ""
        if len(logged) > 6:
            bands += f" Not drawn: {escape(', '.join(logged[6:]))}."
        sections.append(
            f"<h2>Training</h2><p class=soft>Pale: as logged; full: moving average.{bands}</p>"
            + _image(plots.curves(comparison, logged[:6]), "metrics over training steps")
        )
    if tree := family_tree(comparison.members):
        sections.append(
            "<h2>Family tree</h2><p class=soft>From left to right: which run was made from which, and in what role. "
            f"Blue frame: a run of this report.</p><div class=scroll>{tree}</div>"
        )
    sections += [_responses(comparison), f"<h2>Runs</h2>{''.join(map(_run, comparison.members))}"]
    page = (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{_CSS}</style></head><body>{''.join(sections)}"
        f"<script>{_JS}</script></body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _summary(comparison: Comparison) -> str:
    runs, groups = len(comparison.members), len(comparison.groups)
    unfinished = sum(not member.finished for member in comparison.members)
    parts = [f"{runs} run{'s' * (runs != 1)}"]
    if comparison.seeds > 1:
        parts.append(f"{groups} settings, up to {comparison.seeds} seeds each ({comparison.error_note})")
    if comparison.varying:
        parts.append("differing in " + ", ".join(f"<code>{escape(key)}</code>" for key in comparison.varying))
    if unfinished:
        parts.append(f"<span class=bad>{unfinished} not finished: not in the means of finished runs</span>")
    return "; ".join(parts) + "."


def _failed(failed: Sequence[Failure]) -> str:
    if not failed:
        return ""
    rows = "".join(
        f"<tr><td>{escape(f.job)}</td><td class=bad>{escape(f.status)}</td><td class=wrap>{escape(f.error)}</td></tr>"
        for f in failed
    )
    return f"<h2 class=bad>Jobs that did not finish</h2><div class=scroll><table>{rows}</table></div>"


def _results(comparison: Comparison, shown: Sequence[str]) -> str:
    short, costs = short_names(comparison.varying), comparison.costs()
    head = ["<th>run</th>"]
    for key in comparison.varying:
        more = comparison.together.get(key, [])
        note = f" (+{len(more)})" if more else ""
        head.append(
            f"<th class=hyperparameter title='{escape(', '.join([key, *more]))}'>{escape(short[key])}{note}</th>"
        )
    head += [f"<th>{escape(name)}</th>" for name in shown] + [f"<th>{COSTS[name]}</th>" for name in costs]
    rows = []
    # By the first metric only: each metric could have a different best group.
    best_one = comparison.best(shown[0]) if shown else None
    for group in comparison.groups:
        members = group.members
        name = escape(members[0].name) if len(members) == 1 else f"{len(members)} runs"
        unfinished = sum(not m.finished for m in members)
        status = f" <span class=bad>{unfinished} unfinished</span>" if unfinished else ""
        title = escape(", ".join(str(m.run.folder) for m in members))
        cells = [f"<td title='{title}'>{name}{status}</td>"]
        cells += [f"<td>{escape(show(group.hyperparameters.get(key)))}</td>" for key in comparison.varying]
        for metric in [*shown, *costs]:
            mean = group.mean(metric)
            best = " best" if group is best_one and metric == shown[0] else ""
            value = "" if math.isnan(mean) else f"{mean:.9g}"
            cells.append(f"<td class='num{best}' data-v='{value}'>{cell(group, metric)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f"<div class=scroll><table class=sort><thead><tr>{''.join(head)}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _image(svg: str, description: str) -> str:
    return f"<img alt='{escape(description)}' src='{plots.data_uri(svg)}'>"


def _responses(comparison: Comparison, prompts: int = 3, settings: int = 6) -> str:
    """Return a section with the runs' responses to the same prompts, from samples.jsonl, one column per setting."""
    columns = {group.label: _samples(group.members[0]) for group in comparison.groups}
    columns = {name: responses for name, responses in columns.items() if responses}
    having, columns = len(columns), dict(list(columns.items())[:settings])
    if not columns:
        return ""
    counts: dict[str, int] = {}
    for responses in columns.values():
        for prompt in responses:
            counts[prompt] = counts.get(prompt, 0) + 1
    asked = sorted(counts, key=lambda prompt: -counts[prompt])[:prompts]
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    rows = "".join(
        f"<tr><td class=wrap><b>{escape(prompt)}</b></td>"
        + "".join(f"<td class=wrap>{escape(responses.get(prompt, ''))}</td>" for responses in columns.values())
        + "</tr>"
        for prompt in asked
    )
    shown = [
        f"{here} of {all_} {what}"
        for here, all_, what in ((len(columns), having, "settings"), (len(asked), len(counts), "prompts"))
        if here < all_
    ]
    note = f"<p class=soft>{escape(' and '.join(shown))}; all are in samples.jsonl of the runs.</p>" if shown else ""
    table = f"<table><thead><tr><th>prompt</th>{head}</tr></thead>{rows}</table>"
    return f"<h2>Responses</h2>{note}<div class=scroll>{table}</div>"


def _samples(member: Member) -> dict[str, str]:
    """Return prompt -> newest response with its score, from a run's samples.jsonl and its evaluations."""
    found: dict[str, str] = {}
    for evaluation in member.evaluations:
        for sample in evaluation.get("samples", []):
            if "prompt" in sample and "after" in sample:
                found[sample["prompt"]] = _scored(sample["after"], sample.get("after_scores", {}))
    for record in run_files.rows(member.run.folder / "samples.jsonl", 200):
        prompt, response = record.get("prompt"), record.get("response")
        if isinstance(prompt, list):
            prompt = prompt[-1].get("content") if prompt and isinstance(prompt[-1], dict) else None
        if isinstance(prompt, str) and isinstance(response, str):
            found[prompt] = _scored(response, record)
    return found


def _scored(response: str, scores: dict[str, Any]) -> str:
    score = next((scores[k] for k in ("gold", "score", "reward") if isinstance(scores.get(k), int | float)), None)
    return response if score is None else f"{response}  [{show(float(score), 3)}]"


def _run(member: Member) -> str:
    status, summary = member.run.status_file, member.run.summary
    facts = [("directory", str(member.run.folder)), ("status", member.run.status)]
    facts += [(key, str(status[key])) for key in ("command", "started", "error") if status.get(key)]
    config = member.run.folder / "config.yaml"
    parts = [
        "<table>"
        + "".join(f"<tr><td>{escape(k)}</td><td class=wrap>{escape(v)}</td></tr>" for k, v in facts)
        + "</table>",
        f"<details><summary>config.yaml</summary><pre>{escape(config.read_bytes().decode(errors='replace'))}</pre></details>",
    ]
    if summary:
        parts.append(
            f"<details><summary>summary.json</summary><pre>{escape(json.dumps(summary, indent=1))}</pre></details>"
        )
    return f"<details><summary>{escape(member.name)}</summary>{''.join(parts)}</details>"
