"""What the HTML reports share: one self-contained document with its content policy, tables, lists of facts, the style.

Verified by: tests/evals/test_recall_report.py, tests/workbench/test_runs.py.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape

_STYLE = """
:root{color-scheme:light dark;--fg:#1d2330;--bg:#fff;--dim:#667085;--line:#d9dee7;--a:#2563a8;--b:#c2410c;--ok:#15803d}
@media(prefers-color-scheme:dark){:root{--fg:#e6e9ef;--bg:#14171d;--dim:#98a2b3;--line:#333a47;--a:#7db3ee;--b:#fb923c;
--ok:#4ade80}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg);max-width:1180px;margin:0 auto;
padding:20px}
h1{font-size:24px}h2{font-size:20px;margin-top:44px;border-bottom:1px solid var(--line)}
h3{font-size:16px;margin-top:28px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px;margin:8px 0}
td,th{padding:4px 9px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}th{color:var(--dim);font-weight:600;vertical-align:bottom}
small,.dim,.i{color:var(--dim)}.i{font-size:11px;display:block}
.base{font-weight:700}.bad{color:var(--b)}.good{color:var(--ok)}
code{overflow-wrap:anywhere;font-size:13px}svg{max-width:860px;width:100%;height:auto;font:11px system-ui,sans-serif}
svg .g{stroke:var(--line)}svg .t{fill:var(--dim)}svg .a{fill:var(--fg);font-size:12px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;font-size:13px}dt{color:var(--dim)}dd{margin:0;
overflow-wrap:anywhere}
"""


def document(title: str, body: str, style: str = "", script: str = "", has_pictures: bool = False) -> str:
    """The whole file. Nothing can be fetched from it, and of scripts only `script` runs.

    Args: title: plain text; body: markup; style, script: of this page, beside what all pages share; has_pictures: in
        data: URLs.
    """
    hash_of_script = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    policy += "; img-src data:" if has_pictures else ""
    policy += f"; script-src 'sha256-{hash_of_script}'" if script else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head><body>"
        f"<h1>{escape(title)}</h1>{body}{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table; each row is (class, cells); heads and cells are markup already."""
    head = "".join(f"<th>{head}</th>" for head in heads)
    body = "".join(
        f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" for kind, cells in rows
    )
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def facts(values: Mapping[str, str]) -> str:
    """Names and values, plain text, as a list."""
    return (
        "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in values.items()) + "</dl>"
    )
