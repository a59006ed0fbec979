"""Family tree of runs as SVG, from their lineage.json: which run was made from which."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from rlhf.report.members import Member, parents
from rlhf.report.sweep import show
from rlhf.runs.run_directory import Run

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN, PORT = 150, 44, 110, 14, 8, 14  # pixels
ALIKE = 6  # if more runs than this share stage and parents, they are drawn as one box
# Colours by kind of stage; any other stage is grey.
FILL = {
    "pretrain": "#E8EEF4",
    "sft": "#DCEBF7",
    "collect": "#FFF3D6",
    "reward_model": "#FBE3D6",
    "rejection_sampling": "#E3F1E7",
    "ppo": "#DDF0E4",
    "dpo": "#DDF0E4",
}


@dataclass
class _Box:
    """Box of one or more runs; without runs, a bend where an arrow passes a column."""

    runs: list[Run] = field(default_factory=list)
    marked: bool = False  # whether it is a run of the report and not only an ancestor
    x: float = 0.0
    y: float = 0.0

    @property
    def height(self) -> float:
        return HEIGHT if self.runs else 0.0

    @property
    def middle(self) -> float:
        return self.y + self.height / 2


@dataclass(frozen=True)
class _Arrow:
    roles: str
    path: tuple[str, ...]  # names of the boxes from parent to child, bends between them


def family_tree(members: Sequence[Member]) -> str:
    """Return the SVG of a report's runs and their ancestors, ancestors on the left; "" if no run has an ancestor."""
    boxes, edges = _boxes(members)
    if not edges:
        return ""
    depth = _depths(boxes, edges)
    columns: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
    for name in boxes:
        columns[depth[name]].append(name)
    arrows = []
    for (parent, child), roles in edges.items():
        # Arrows from one box to later columns share their bends, so that they are drawn as one line.
        bends = [f"{parent} {i}" for i in range(depth[parent] + 1, depth[child])]
        for i, bend in enumerate(bends, depth[parent] + 1):
            if bend not in boxes:
                boxes[bend] = _Box()
                columns[i].append(bend)
        arrows.append(_Arrow(", ".join(dict.fromkeys(roles)), (parent, *bends, child)))
    _place(boxes, columns, arrows)
    width = len(columns) * WIDTH + (len(columns) - 1) * GAP_X + 2 * MARGIN
    height = max(box.y + box.height for box in boxes.values()) + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" width="{width}" '
            f'height="{height:.0f}" font-family="system-ui, sans-serif" role="img" '
            f'aria-label="family tree of the runs">',
            *(
                _draw_arrow([boxes[name] for name in arrow.path], arrow.roles, port)
                for arrow, port in zip(arrows, _ports(arrows, boxes), strict=True)
            ),
            *(_draw_box(box) for box in boxes.values() if box.runs),
            "</svg>",
        ]
    )


def _boxes(members: Sequence[Member]) -> tuple[dict[str, _Box], dict[tuple[str, str], list[str]]]:
    """Return the boxes by name, and (parent, child) -> roles."""
    runs: dict[str, Run] = {}
    above: dict[str, list[tuple[str, str]]] = {}  # fingerprint -> (role, fingerprint of the parent)

    def visit(run: Run) -> None:
        if run.fingerprint in runs:
            return
        runs[run.fingerprint] = run
        found = parents(run)
        above[run.fingerprint] = [(role, parent.fingerprint) for role, parent in found]
        for _, parent in found:
            visit(parent)

    for member in members:
        visit(member.run)
    marked = {member.run.fingerprint for member in members}
    is_parent = {parent for found in above.values() for _, parent in found}
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, run in runs.items():
        if name not in is_parent:
            alike.setdefault((run.stage, name in marked, *sorted(above[name])), []).append(name)
    box_of = {name: name for name in runs}
    for names in alike.values():
        if len(names) > ALIKE:
            box_of |= dict.fromkeys(names, names[0])
    boxes: dict[str, _Box] = {}
    edges: dict[tuple[str, str], list[str]] = {}
    for name, run in runs.items():
        box = boxes.setdefault(box_of[name], _Box(marked=name in marked))
        box.runs.append(run)
        for role, parent in above[name]:
            edges.setdefault((box_of[parent], box_of[name]), []).append(role)
    return boxes, edges


def _depths(boxes: dict[str, _Box], edges: dict[tuple[str, str], list[str]]) -> dict[str, int]:
    """Return the column of each box: the length of the longest path to it from a box without parents."""
    above: dict[str, list[str]] = {}
    for parent, child in edges:
        above.setdefault(child, []).append(parent)
    depth: dict[str, int] = {}

    def measure(name: str) -> int:
        if name not in depth:
            depth[name] = 0  # guards against a cycle in an edited lineage
            depth[name] = 1 + max(map(measure, above.get(name, [])), default=-1)
        return depth[name]

    for name in boxes:
        measure(name)
    return depth


def _place(boxes: dict[str, _Box], columns: list[list[str]], arrows: Sequence[_Arrow]) -> None:
    """Set the corners of all boxes, ordered in each column by their parents, which keeps arrows from crossing."""
    before: dict[str, list[str]] = {}
    for arrow in arrows:
        for left, right in zip(arrow.path, arrow.path[1:], strict=False):
            before.setdefault(right, []).append(left)
    heights = [sum(boxes[name].height + GAP_Y for name in column) - GAP_Y for column in columns]
    for i, (column, height) in enumerate(zip(columns, heights, strict=True)):

        def wish(name: str) -> tuple[float, bool]:
            near = [boxes[left].middle for left in before.get(name, [])]
            return (sum(near) / len(near) if near else 0.0), not boxes[name].runs

        column.sort(key=wish)
        y = MARGIN + (max(heights) - height) / 2
        for name in column:
            boxes[name].x, boxes[name].y = MARGIN + i * (WIDTH + GAP_X), y
            y += boxes[name].height + GAP_Y


def _draw_arrow(path: Sequence[_Box], roles: str, port: float) -> str:
    """Return a curve through boxes that ends ``port`` pixels below the middle of the last box."""
    x, y = path[0].x + WIDTH, path[0].middle
    line = [f"M{x:.0f},{y:.1f}"]
    for box in path[1:]:
        half = (box.x - x) / 2
        at = box.middle + (port if box is path[-1] else 0.0)
        line.append(f"C{x + half:.0f},{y:.1f} {box.x - half:.0f},{at:.1f} {box.x:.0f},{at:.1f}")
        x, y = box.x + WIDTH, at
        if not box.runs:
            line.append(f"H{x:.0f}")
    return (
        f'<path d="{" ".join(line)}" fill="none" stroke="#9AA5B1" stroke-width="1.3"><title>{escape(roles)}</title>'
        f'</path><text x="{path[-1].x - 5:.0f}" y="{y - 3:.1f}" font-size="9.5" fill="#52606D" '
        f'text-anchor="end">{escape(roles)}</text>'
    )


def _ports(arrows: Sequence[_Arrow], boxes: dict[str, _Box]) -> list[float]:
    """Return for each arrow its end on the side of its box: in order of their origins, one below the other."""
    ports = []
    for arrow in arrows:
        same = sorted((a for a in arrows if a.path[-1] == arrow.path[-1]), key=lambda a: boxes[a.path[-2]].middle)
        ports.append((same.index(arrow) - (len(same) - 1) / 2) * PORT)
    return ports


def _draw_box(box: _Box) -> str:
    first, several = box.runs[0], len(box.runs) > 1
    values = [float(v) for run in box.runs if isinstance(v := run.summary.get("value"), int | float)]
    finished = all(run.finished for run in box.runs)
    results = " to ".join(dict.fromkeys(show(value, 3) for value in (min(values), max(values)))) if values else ""
    head = f"{first.stage} × {len(box.runs)}" if several else first.stage
    below = " · ".join(text for text in ("" if several else first.folder.name[:6], results) if text)
    titles = "\n".join(f"{run.folder} ({run.status})" for run in box.runs)
    fill = FILL.get(first.stage, "#EFEFEF") if finished else "#FFFFFF"
    line, dashes = "#0072B2" if box.marked else "#9AA5B1", "" if finished else ' stroke-dasharray="4 3"'
    x, y = f"{box.x:.0f}", box.y
    shadow = (
        f'<rect x="{box.x + 4:.0f}" y="{y + 4:.1f}" width="{WIDTH}" height="{HEIGHT}" rx="7" fill="{fill}" '
        'stroke="#9AA5B1"/>'
        if several
        else ""
    )
    return (
        f"<g><title>{escape(titles)}</title>{shadow}"
        f'<rect x="{x}" y="{y:.1f}" width="{WIDTH}" height="{HEIGHT}" rx="7" fill="{fill}" '
        f'stroke="{line}" stroke-width="{2 if box.marked else 1}"{dashes}/>'
        f'<text x="{box.x + 10:.0f}" y="{y + 18:.1f}" font-size="12.5" font-weight="600" fill="#1F2933">'
        f'{escape(head)}</text><text x="{box.x + 10:.0f}" y="{y + 34:.1f}" font-size="10.5" fill="#52606D">'
        f"{escape(below)}</text></g>"
    )
