"""Draw the identities between variants: benchmarks/results/identities.png.

    python benchmarks/identities.py

The edges come from the registries (minitv/identities.py), and each of them is a law. A box is a variant (blue) or an operator;
each text in it is one restriction, with an arrow to what it becomes then. What only one box leads to is named in the text.
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from pathlib import Path

from minitv import variants
from minitv.identities import between_variants

OUT = Path(__file__).resolve().parent / "results" / "identities.png"
WIDTH, BOX, GAP, MARGIN = 8.0, 2.3, 0.42, 0.24  # of the picture, boxes, and around columns, in inches: 8 are 800 pixels
LINE, PAD, APART = 0.125, 0.06, 0.14  # height of a line of text, margin in a box, and distance between two
LETTERS = 41  # in a line of text
COLUMNS = 3


class Node:
    """A box: its name, and the lines of text of each edge that begins in it."""

    def __init__(self, name: str, edges: list, boxes: set[str]):
        self.name, self.edges = name, edges
        texts = [f"if {edge.when}" if edge.special in boxes else f"becomes {edge.special} if {edge.when}" for edge in edges]
        self.lines = [textwrap.wrap(text, LETTERS, break_on_hyphens=False) for text in texts]
        self.column, self.top = 0, 0.0

    @property
    def height(self) -> float:
        return 2 * PAD + LINE * (1.2 + sum(map(len, self.lines)))

    @property
    def left(self) -> float:
        return self.column * (BOX + GAP)

    def row(self, number: int) -> float:
        """The height at which an edge begins."""
        before = sum(map(len, self.lines[:number]))
        return self.top + PAD + LINE * (1.2 + before + len(self.lines[number]) / 2)


def placed(edges: list) -> list[Node]:
    """The boxes at their places: what becomes something stands to the left of it, and what belongs together is close."""
    sources, ends = [edge.general for edge in edges], [edge.special for edge in edges]
    boxes = {*sources, *(name for name in ends if ends.count(name) > 1)}
    nodes = {name: Node(name, [edge for edge in edges if edge.general == name], boxes)
             for name in dict.fromkeys([*sources, *ends]) if name in boxes}
    drawn = [edge for edge in edges if edge.special in boxes]

    def depth(name: str, path: tuple[str, ...] = ()) -> int:
        """How many arrows lead from here to an end, at most; one that leads back to where it came from does not count."""
        further = [depth(edge.special, (*path, name)) for edge in drawn
                   if edge.general == name and edge.special not in (*path, name)]
        return 1 + max(further) if further else 0

    for name, node in nodes.items():
        node.column = COLUMNS - 1 - min(depth(name), COLUMNS - 1)
    filled = [0.0] * COLUMNS
    connected = groups(drawn)
    alone = [node for name, node in nodes.items() if not any(name in group for group in connected)]
    first = max(connected, key=len)
    rest = sorted((group for group in connected if group is not first),
                  key=lambda group: (any(nodes[name].column == 0 for name in group), -len(group)))
    for group in (first, *rest):
        if group is not first and any(nodes[name].column == 0 for name in group):  # what fits beside what is there
            alone = [node for node in alone if not _set(node, filled, filled[0])]
        _place([nodes[name] for name in group], drawn, filled)
    for node in alone:
        _set(node, filled)
    return list(nodes.values())


def _set(node: Node, filled: list[float], limit: float | None = None) -> bool:
    """Put a box without arrows at the end of the shortest column, if it ends above a limit."""
    column = filled.index(min(filled))
    if limit is not None and filled[column] + node.height > limit:
        return False
    node.column, node.top = column, filled[column]
    filled[column] += node.height + APART
    return True


def _place(group: list[Node], drawn: list, filled: list[float]) -> None:
    """Put connected boxes below what is there, each beside the boxes that lead to it."""
    names = {node.name: node for node in group}
    used = {node.column for node in group}
    bottom = max(filled[column] for column in range(min(used), COLUMNS))
    filled[min(used):] = [bottom] * (COLUMNS - min(used))
    for column in sorted(used):
        passing = [node.row(number) for node in group if node.column < column for number, edge in enumerate(node.edges)
                   if edge.special in names and names[edge.special].column > column]
        least = max(passing, default=bottom - APART) + 2 * APART

        def wish(node: Node, least: float = least) -> float:
            befores = [names[edge.general] for edge in drawn if edge.special == node.name and edge.general in names]
            befores = [other for other in befores if other.column < node.column]
            middle = sum(other.top + other.height / 2 for other in befores) / len(befores) if befores else bottom
            return max(least, middle - node.height / 2 if befores else bottom)

        for node in sorted((node for node in group if node.column == column), key=wish):
            node.top = max(filled[column], wish(node))
            filled[column] = node.top + node.height + APART


def groups(edges: list) -> list[list[str]]:
    """The names that edges connect, directly or by way of others."""
    found: list[set[str]] = []
    for edge in edges:
        joined = {edge.general, edge.special}.union(*(group for group in found if group & {edge.general, edge.special}))
        found = [group for group in found if not group & joined] + [joined]
    return [sorted(group) for group in found]


def draw(out: Path) -> None:
    """Draw the graph."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    nodes = {node.name: node for node in placed(between_variants())}
    height = max(node.top + node.height for node in nodes.values())
    left = WIDTH - COLUMNS * BOX - (COLUMNS - 1) * GAP - 0.02  # room for an arrow within the first column
    figure = plt.figure(figsize=(WIDTH, height + 2 * MARGIN))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-left, WIDTH - left), ylim=(height + MARGIN, -MARGIN))
    axes.axis("off")
    known = variants.variants()
    for node in nodes.values():
        kind = "#e8f0fb" if node.name in known else "#f3f3f0"
        axes.add_patch(FancyBboxPatch((node.left, node.top), BOX, node.height, boxstyle="round,pad=0,rounding_size=0.06",
                                      facecolor=kind, edgecolor="#5b7aa8" if node.name in known else "#9a9a90", linewidth=0.8))
        axes.text(node.left + PAD + 0.02, node.top + PAD + LINE * 0.55, node.name, fontsize=8.5, fontweight="bold", va="center")
        line = 1.2
        for text in (text for lines in node.lines for text in lines):
            axes.text(node.left + PAD + 0.02, node.top + PAD + LINE * (line + 0.5), text, fontsize=7, va="center", color="#333")
            line += 1
    arrivals = defaultdict(list)
    for node in nodes.values():
        for number, edge in enumerate(node.edges):
            if edge.special in nodes:
                arrivals[edge.special].append((node.row(number), node.name, number))
    for name, ends in arrivals.items():
        target = nodes[name]
        for place, (y, source, _) in enumerate(sorted(ends)):
            start = nodes[source]
            forward = start.column < target.column
            x1 = start.left + (BOX if forward else 0)
            x2 = target.left + (0 if forward or start.column == target.column else BOX)
            y2 = target.top + target.height * (place + 1) / (len(ends) + 1)
            bend = abs(x2 - x1) / 2 if x1 != x2 else GAP * 0.6
            sign = 1 if forward else -1
            into = -sign if x1 != x2 else -1
            path = matplotlib.path.Path([(x1, y), (x1 + sign * bend, y), (x2 + into * bend, y2), (x2, y2)],
                                        [matplotlib.path.Path.MOVETO] + 3 * [matplotlib.path.Path.CURVE4])
            axes.add_patch(FancyArrowPatch(path=path, arrowstyle="-|>", mutation_scale=7, linewidth=0.8, color="#5b7aa8",
                                           shrinkA=0, shrinkB=0))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=200, metadata={"Software": None})
    print(out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out)


if __name__ == "__main__":
    draw(OUT)
