"""The elements and the style of a run's page: HTML without scripts, and with nothing from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from pathline.training.charts import COLOURS

__all__ = ["Section", "details", "document", "facts", "note", "picture", "table"]

LIGHT = {
    "paper": "#f6f7f9",
    "card": "#ffffff",
    "ink": "#1b2430",
    "muted": "#5a6675",
    "line": "#dfe4ea",
    "accent": "#0b5394",
    "alarm": "#a3320b",
}
DARK = {
    "paper": "#11161d",
    "card": "#1a212b",
    "ink": "#e6ebf1",
    "muted": "#9fabba",
    "line": "#303a47",
    "accent": "#7db7ec",
    "alarm": "#f0976c",
}
LINES_LIGHT = ["#0b5394", "#c65d12", "#2b8049", "#a64d79", "#8a6d3b", "#5b7083", "#8f7a00", "#12888e"]
LINES_DARK = ["#6fb1f0", "#f09a5b", "#63c487", "#dd8fb6", "#cfae72", "#a3b5c6", "#d8c23f", "#4fc7cc"]
STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
header, main, footer { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
header p { margin: 4px 0 0; color: var(--muted); overflow-wrap: anywhere; }
nav { margin-top: 14px; display: flex; flex-wrap: wrap; gap: 4px 18px; }
a { color: var(--accent); text-underline-offset: 3px; }
h2 { font-size: 18px; margin: 34px 0 12px; }
h3 { font-size: 14px; margin: 0; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(168px, 1fr)); gap: 10px; margin: 0; }
.facts div, .chart, .wide, details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.facts div { padding: 10px 14px; min-width: 0; }
.facts dt { color: var(--muted); font-size: 13px; }
.facts dd { margin: 0; font-size: 17px; font-weight: 600; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 12px; }
.chart { margin: 0; padding: 12px 14px; min-width: 0; }
.chart figcaption { display: flex; justify-content: space-between; gap: 12px; margin-bottom: 6px; }
.latest { color: var(--muted); font-size: 13px; white-space: nowrap; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--muted); font-size: 11px; }
.grid { stroke: var(--line); fill: none; }
.line { stroke: var(--c); stroke-width: 1.8; fill: none; stroke-linejoin: round; }
.raw { stroke: var(--c); stroke-width: 0.8; opacity: 0.4; fill: none; }
.dot { fill: var(--c); }
.legend { list-style: none; margin: 8px 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 2px 14px;
  font-size: 13px; }
.legend li { overflow-wrap: anywhere; }
.legend b { font-weight: 400; color: var(--muted); }
.mark { display: inline-block; width: 14px; height: 3px; background: var(--c); margin-right: 6px;
  vertical-align: middle; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(230px, 100%), 1fr)); gap: 12px; }
.pictures figure { margin: 0; }
.pictures img { display: block; width: 100%; border: 1px solid var(--line); border-radius: 6px; background: #fff;
  image-rendering: pixelated; }
.pictures figcaption { color: var(--muted); font-size: 13px; margin-top: 4px; }
.wide { overflow-x: auto; margin-bottom: 12px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 10px 14px 4px; color: var(--muted); font-size: 13px; }
th, td { text-align: left; vertical-align: top; padding: 6px 14px; border-top: 1px solid var(--line);
  overflow-wrap: break-word; max-width: 620px; }
thead th { border-top: 0; color: var(--muted); font-weight: 600; font-size: 13px; white-space: nowrap; }
tbody th { font-weight: 600; white-space: nowrap; }
td.number { text-align: right; white-space: nowrap; }
th.number { text-align: right; }
details { padding: 10px 14px; margin-bottom: 12px; }
summary { cursor: pointer; font-weight: 600; }
pre { margin: 10px 0 0; overflow-x: auto; font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.note { color: var(--muted); margin: 0 0 12px; }
.alarm { color: var(--alarm); }
footer { color: var(--muted); font-size: 13px; padding-top: 30px; padding-bottom: 40px; }
a:focus-visible, summary:focus-visible, .wide:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
@media print { nav { display: none; } .chart, .pictures figure { break-inside: avoid; } }
"""
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # what a browser is to load: nothing from outside
)


class Section(NamedTuple):
    """A part of a page.

    Attributes:
        title: its heading.
        content: HTML; an empty one leaves the section out.
    """

    title: str
    content: str

    @property
    def name(self) -> str:
        """What links to it say."""
        return self.title.lower().replace(" ", "-")


def document(title: str, below: str, sections: Iterable[Section], closing: str) -> str:
    """Return a page.

    Args:
        title: of it, and its first heading.
        below: a line on what it is about.
        sections: in their order; those without content are left out.
        closing: a line at the end.
    """
    shown = [section for section in sections if section.content]
    links = "".join(f'<a href="#{section.name}">{escape(section.title)}</a>' for section in shown)
    parts = "".join(
        f'<section aria-labelledby="{section.name}"><h2 id="{section.name}">{escape(section.title)}</h2>'
        f"{section.content}</section>\n"
        for section in shown
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_variables()}{STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p>{escape(below)}</p><nav aria-label="Sections">{links}</nav></header>
<main>
{parts}</main>
<footer>{escape(closing)}</footer>
</body>
</html>
"""


def _variables() -> str:
    def rules(colours: Mapping[str, str], lines: Sequence[str]) -> str:
        root = "".join(f"--{name}:{value};" for name, value in colours.items())
        return f":root{{{root}}}" + "".join(f".c{number}{{--c:{lines[number]}}}" for number in range(COLOURS))

    dark = rules(DARK, LINES_DARK)
    return f"{rules(LIGHT, LINES_LIGHT)}\n@media (prefers-color-scheme: dark) {{{dark}}}"


def facts(told: Mapping[str, str]) -> str:
    """Return names with their values."""
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in told.items())
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """Return a table whose first cells head their rows, or nothing for one without rows.

    Args:
        caption: of the table.
        head: of its columns.
        rows: of cells, as many as the head.
        numbers: columns that are set to the right.
    """
    if not rows:
        return ""

    def line(cells: Sequence[str], scope: str) -> str:
        parts = []
        for place, text in enumerate(cells):
            kind = ' class="number"' if place in numbers else ""
            heads = scope == "col" or place == 0
            parts.append(
                f'<th scope="{scope}"{kind}>{escape(text)}</th>' if heads else f"<td{kind}>{escape(text)}</td>"
            )
        return f"<tr>{''.join(parts)}</tr>"

    top, body = line(head, "col"), "".join(line(row, "row") for row in rows)
    return (
        f'<div class="wide" role="region" aria-label="{escape(caption)}" tabindex="0">'
        f"<table><caption>{escape(caption)}</caption><thead>{top}</thead><tbody>{body}</tbody></table></div>"
    )


def details(title: str, text: str) -> str:
    """Return text that is shown on demand, or nothing for none."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>" if text else ""


def note(text: str, *, alarm: bool = False) -> str:
    """Return a line of text."""
    return f'<p class="note{" alarm" if alarm else ""}">{escape(text)}</p>'


def picture(content: bytes, kind: str, description: str, caption: str) -> str:
    """Return a figure of a picture, which is put into the page; ``kind`` is ``png`` or ``jpeg``."""
    data = base64.b64encode(content).decode()
    return (
        f'<figure><img src="data:image/{kind};base64,{data}" alt="{escape(description)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
