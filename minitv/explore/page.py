"""The page as a text: HTML with everything in it, so that a browser asks nobody for anything.

Texts and names come from files and are not trusted: in HTML they are escaped, in the JSON no < is left, and the script writes
them as text alone. A policy in the page's head forbids every connection.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from ..errors import UserError

LIMIT = 8 * 10**6  # bytes of a page
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "\
         "form-action 'none'"


def library() -> str:
    """The plotting library's JavaScript; UserError where it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError('a page needs plotly: pip install "minitv[explore]"') from None
    return get_plotlyjs()


def page(studies: Sequence[Mapping[str, Any]], script: str, tokens: int) -> str:
    """The page of what ``study`` gave of one run or several."""
    names = [str(study["name"]) for study in studies]
    title = f"{studies[0]['variant']}: what the model does" if len(studies) == 1 else "What the models do, side by side"
    here, sides = files(__package__), ("a", "b")[: len(studies)]
    data = json.dumps({"runs": studies, "tokens": tokens}, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return "\n".join([
        "<!DOCTYPE html>", '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">', f"<title>{html.escape(title)}</title>",
        f"<style>\n{here.joinpath('page.css').read_text('utf-8')}</style></head><body>",
        f'<header><h1>{html.escape(title)}</h1>'
        f'<p>Run{"s" * (len(names) > 1)}: {html.escape(", ".join(names))}</p></header><main>',
        '<section aria-labelledby="curves-title" id="curves"><h2 id="curves-title">Learning curves</h2>'
        '<div class="plot tall" role="img" aria-label="Learning curves beside their baselines"></div>'
        '<p class="note"></p><details><summary>As a table</summary><div class="scroll"></div></details></section>',
        f'<div class="sides sides-{len(sides)}">', *(_side(side, names) for side in sides), "</div></main>",
        "<footer><p>Written by minitv explore. Everything is in this file; it loads nothing.</p></footer>",
        f'<script type="application/json" id="data">{data}</script>',
        f"<script>{script}</script>",
        f"<script>\n{here.joinpath('page.js').read_text('utf-8')}</script></body></html>", ""])


def _side(side: str, names: Sequence[str]) -> str:
    """The panels of one run, which the script fills."""
    options = "".join(f'<option value="{i}">{html.escape(name)}</option>' for i, name in enumerate(names))
    chooser = (f'<p class="controls"><label for="run-{side}">Run</label> <select id="run-{side}">{options}</select></p>'
               if len(names) > 1 else "")

    def panel(name: str, title: str, inside: str) -> str:
        return (f'<section id="{name}-{side}" class="panel" aria-labelledby="{name}-title-{side}">'
                f'<h3 id="{name}-title-{side}">{title}</h3>{inside}</section>')

    def plot(label: str, kind: str = "") -> str:
        return f'<div class="plot {kind}" role="img" aria-label="{label}"></div>'

    def select(name: str, label: str, **options: str) -> str:
        choices = "".join(f'<option value="{value}">{text}</option>' for value, text in options.items())
        return (f'<span><label for="{name}-{side}">{label}</label> '
                f'<select id="{name}-{side}" class="{name}">{choices}</select></span>')

    return "".join([
        f'<div class="side" id="side-{side}"><h2 id="title-{side}">Run</h2>{chooser}<dl class="facts"></dl>',
        panel("text", "What it expects", '<p class="note"></p><div class="legend" aria-hidden="true"></div>'
              f'<div class="text" id="tokens-{side}" role="listbox" tabindex="0" aria-labelledby="text-title-{side}"></div>'
              '<p class="hint">Point at a token, or move with the arrow keys.</p><div class="said" role="status"></div>'
              '<details><summary>As a table</summary><div class="scroll"></div></details>'),
        panel("mixing", "What each position takes from the others",
              '<p class="note">The matrix M says where the output of a layer comes from: M[t, s] is the weight of the values '
              'at position s in the output at position t. Row t is what position t takes; column s is what is taken from s.</p>'
              '<p class="note law"></p>'
              '<p class="controls">' + select("call", "Layer") + select("head", "Matrix")
              + select("scale", "Colours", root="show small weights", plain="in proportion") + "</p>"
              + '<div class="pick">'
              + plot("Matrix of weights: a row for each position, a column for each position it takes from", "square")
              + '<p class="hint"></p>'
              f'<p class="controls"><label for="row-{side}">Row t</label> '
              f'<input id="row-{side}" class="row" type="range" min="0" value="0"> <output></output></p>'
              '<div class="rowtable"></div></div>'
              '<div class="every"><h4>All at a glance</h4><p class="hint">Press one to enlarge it.</p>'
              '<div class="glance"></div></div>'),
        '<div class="rest">', panel("distance", "How far it looks", '<p class="note"></p>' + plot("Weight by distance")
              + plot("The same as a spectrum over frequencies", "spectrum") + plot("How much each position is read", "read")),
        panel("inputs", "What else the operator reads", '<p class="note"></p><div class="drawn"></div>'),
        panel("influence", "Which token changes which prediction", '<p class="note"></p>'
              + plot("Change of each prediction by a change of each token", "square")),
        panel("state", "Size of the state", '<p class="note"></p>' + plot("Bytes of the state by the number of tokens")
              + '<details><summary>As a table</summary><div class="scroll"></div></details>'),
        panel("readings", "Numbers of the layers in training", '<p class="note">A line for each layer.</p>'
              + plot("Numbers of the layers by step", "tall")),
        panel("sample", "An example of what it writes", "<pre></pre>"),
        panel("missing", "What is not shown", "<ul></ul>"), "</div></div>"])
