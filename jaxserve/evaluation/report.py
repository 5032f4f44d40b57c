"""The report: one HTML file with everything in it, readable on light and dark screens."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from jaxserve.evaluation.plots import DARK, LIGHT, Plot, render
from jaxserve.evaluation.result import FILE, Result, Table

FILE_NAME = "report.html"
STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #d9dee3;
  --bad: #d1242f; --bad-back: #ffebe9; --good: #1a7f37; --tag: #eef1f4; }
@media (prefers-color-scheme: dark) { :root { --back: #16191d; --ink: #e6e9ed; --soft: #9aa3ae; --line: #31363d;
  --bad: #ff6b6b; --bad-back: #3c1618; --good: #4ac26b; --tag: #262b31; } }
body { background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 1080px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; } p.question, figcaption, td.how { color: var(--soft); }
table { border-collapse: collapse; width: 100%; } .scroll { overflow-x: auto; }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.value { font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.failed, p.failed { background: var(--bad-back); color: var(--bad); font-weight: 600; }
tr.failed td { color: inherit; }
p.failed { padding: .6rem .9rem; } .good { color: var(--good); font-weight: 600; }
.tag { background: var(--tag); color: var(--soft); border-radius: 4px; padding: 0 .4rem; font-size: .85em; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; }
"""
SIMULATED = (
    "The devices are simulated on the cores of one machine: times and rates say nothing about real devices, and a "
    "larger mesh is not faster here. They are marked “simulated”."
)


def write_report(result: Result, plots: Sequence[Plot], directory: Path) -> None:
    """``report.html``, ``result.json`` and the plots, into ``directory``."""
    result.write(directory)
    figures = []
    for plot in plots:
        light, dark = render(plot, LIGHT), render(plot, DARK)
        (directory / f"{plot.name}.png").write_bytes(light)
        (directory / f"{plot.name}-dark.png").write_bytes(dark)
        figures.append(_figure(plot, light, dark))
    (directory / FILE_NAME).write_text(_page(result, figures), encoding="utf-8")


def _page(result: Result, plots: Sequence[str]) -> str:
    parts = [
        f"<h1>{escape(result.script)}</h1><p class='question'>{escape(result.question)}</p>",
        _verdict(result),
        f"<p>{escape(SIMULATED)}</p>" if result.simulated else "",
        _checks(result),
        *plots,
        _figures(result),
        *(_table(table) for table in result.tables),
        f"<h2>Where and how</h2><p>Raw samples are in <code>{FILE}</code> beside this file.</p>",
        _facts({"options": result.options, "mesh": result.mesh, "seed": result.seed} | result.environment),
    ]
    head = (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(result.script)}</title><style>{STYLE}</style>"
    )
    return head + "\n".join(part for part in parts if part) + "</html>\n"


def _verdict(result: Result) -> str:
    if not result.checks:
        return ""
    if not result.failed:
        return f"<p class='good'>All {len(result.checks)} checks passed.</p>"
    return "".join(f"<p class='failed'>FAILED: {escape(c.name)}: {escape(c.detail)}</p>" for c in result.failed)


def _checks(result: Result) -> str:
    if not result.checks:
        return ""
    rows = [("passed" if c.passed else "FAILED", c.name, c.detail) for c in result.checks]
    failed = [i for i, c in enumerate(result.checks) if not c.passed]
    return _table(Table("Checks", ("", "what must hold", "what was seen"), rows, failed))


def _figures(result: Result) -> str:
    if not result.figures:
        return ""
    rows = []
    for f in result.figures:
        mark = " <span class='tag'>simulated</span>" if f.simulated else ""
        kind = " class='failed'" if f.name in result.failed_figures else ""
        cells = f"<td>{escape(f.name)}{mark}</td><td class='value'>{escape(f.text)}</td>"
        rows.append(f"<tr{kind}>{cells}<td class='how'>{escape(f.how)}</td></tr>")
    head = "<tr><th>figure</th><th>value</th><th>how it was measured</th></tr>"
    return f"<h2>Figures</h2><div class='scroll'><table>{head}{''.join(rows)}</table></div>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = [
        f"<tr{' class=failed' if i in table.failed else ''}>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>"
        for i, row in enumerate(table.rows)
    ]
    body = f"<tr>{head}</tr>{''.join(rows)}"
    return f"<h2>{escape(table.title)}</h2><div class='scroll'><table>{body}</table></div>"


def _figure(plot: Plot, light: bytes, dark: bytes) -> str:
    """Both drawings; the browser shows the one that suits the page."""
    text = escape(f"{plot.title}. {plot.caption}")
    return (
        f"<h2>{escape(plot.title)}</h2><figure><picture>"
        f"<source srcset='{_data(dark)}' media='(prefers-color-scheme: dark)'>"
        f"<img src='{_data(light)}' alt='{text}'></picture><figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _facts(facts: dict[str, Any]) -> str:
    return f"<pre>{escape(json.dumps(facts, indent=1, ensure_ascii=False, default=str))}</pre>"
