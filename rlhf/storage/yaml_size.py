"""Size of a YAML file with its aliases expanded: OmegaConf copies their targets, so nine lines can fill memory."""

from pathlib import Path

import yaml

from rlhf.errors import UserError

MOST = 100_000  # nodes of one file; the largest file of this project has a few hundred


def check(path: Path) -> None:
    """Raise if a YAML file with its aliases expanded has more than ``MOST`` nodes, or endlessly many.

    Raises:
        UserError: One line. A file that is not YAML passes; its loader reports the error.
    """
    try:
        content = path.read_bytes()
        if b"&" not in content or b"*" not in content:
            return
        root = yaml.compose(content, Loader=yaml.SafeLoader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return
    size = 0 if root is None else _size(root, {}, set())
    if size > MOST:
        raise UserError(
            f"{path}: its aliases (*NAME) expand to more than {MOST} values", fix="write the values without aliases"
        )


def _size(node: yaml.Node, known: dict[int, int], open_nodes: set[int]) -> int:
    """Return the number of nodes of a tree, aliases expanded; more than ``MOST`` for a node that contains itself."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in open_nodes:
        return MOST + 1
    open_nodes.add(id(node))
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = list(node.value)
    elif isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    size = 1 + sum(_size(child, known, open_nodes) for child in children)
    open_nodes.discard(id(node))
    known[id(node)] = size
    return size
