"""A page of text, tables and figures, written as one self-contained HTML file and as Markdown with its figures."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_MIME = {"svg": "image/svg+xml", "webp": "image/webp"}


@dataclass(frozen=True)
class Text:
    """A paragraph; `code`, **bold** and [links](target) are understood."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells, under heads; cells as in `Text`."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A picture file.

    Attributes:
        name: of the file, without its suffix.
        kind: "svg" or "webp".
        content: the bytes of the file.
        caption: what is seen, and what to look at.
    """

    name: str
    kind: str
    content: bytes
    caption: str


@dataclass(frozen=True)
class Card:
    """A figure that is read at a glance."""

    value: str
    meaning: str


@dataclass
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: list[Text | Table | Figure | Sequence[Card]] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    """The whole of it."""

    title: str
    lead: str
    sections: list[Section]

    def to_html(self) -> str:
        """One file: style and figures are inside."""
        toc = "".join(f'<a href="#{_anchor(s.title)}">{html.escape(s.title)}</a>' for s in self.sections)
        body = "".join(
            f'<section id="{_anchor(s.title)}"><h2>{html.escape(s.title)}</h2>'
            + "".join(map(_html_block, s.blocks))
            + "</section>"
            for s in self.sections
        )
        title = html.escape(self.title)
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{_STYLE}</style></head><body><header><h1>{title}</h1>"
            f"<p>{_inline(self.lead)}</p><nav>{toc}</nav></header><main>{body}</main></body></html>\n"
        )

    def to_markdown(self, figures: str) -> str:
        """The same with its figures in the folder `figures`, relative to the file."""
        parts = [f"# {self.title}", self.lead]
        for section in self.sections:
            parts.append(f"## {section.title}")
            parts += [_markdown_block(block, figures) for block in section.blocks]
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path, name: str = "report") -> list[Path]:
        """Write NAME.html, NAME.md and NAME-files/; returns the first two."""
        figures = folder / f"{name}-files"
        figures.mkdir(parents=True, exist_ok=True)
        for section in self.sections:
            for block in section.blocks:
                if isinstance(block, Figure):
                    (figures / f"{block.name}.{block.kind}").write_bytes(block.content)
        pages = [folder / f"{name}.html", folder / f"{name}.md"]
        pages[0].write_text(self.to_html(), encoding="utf-8")
        pages[1].write_text(self.to_markdown(figures.name), encoding="utf-8")
        return pages


def _html_block(block: Text | Table | Figure | Sequence[Card]) -> str:
    if isinstance(block, Text):
        return f"<p>{_inline(block.text)}</p>"
    if isinstance(block, Table):
        head = "".join(f"<th>{_inline(cell)}</th>" for cell in block.heads)
        rows = "".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in block.rows)
        return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    if isinstance(block, Figure):
        data = base64.b64encode(block.content).decode()
        alt = html.escape(block.caption)
        image = f'<img alt="{alt}" src="data:{_MIME[block.kind]};base64,{data}">'
        return f"<figure>{image}<figcaption>{_inline(block.caption)}</figcaption></figure>"
    cards = "".join(f"<div><b>{_inline(card.value)}</b><span>{_inline(card.meaning)}</span></div>" for card in block)
    return f'<div class="cards">{cards}</div>'


def _markdown_block(block: Text | Table | Figure | Sequence[Card], figures: str) -> str:
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Table):
        rows = [block.heads, ["---"] * len(block.heads), *block.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    if isinstance(block, Figure):
        return f"![{block.caption}]({figures}/{block.name}.{block.kind})\n\n*{block.caption}*"
    return "\n".join(f"- **{card.value}** {card.meaning}" for card in block)


def _inline(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", r'<a href="\2">\1</a>', text)


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


_STYLE = """
:root{--ink:#1c2430;--soft:#5b6675;--line:#e3e7ec;--accent:#3b6fb6;--paper:#fff;--tint:#f6f8fa}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif}
header,main{max-width:1080px;margin:0 auto;padding:0 24px}
header{padding-top:40px}
h1{font-size:30px;line-height:1.2;margin:0 0 8px}
header p{color:var(--soft);max-width:760px;margin:0 0 16px}
nav{display:flex;flex-wrap:wrap;gap:6px 16px;font-size:14px;border-top:1px solid var(--line);
border-bottom:1px solid var(--line);padding:10px 0}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
h2{font-size:21px;margin:44px 0 10px}
p{max-width:760px}
figure{margin:18px 0}
figure img{max-width:100%;height:auto;display:block}
figcaption{color:var(--soft);font-size:14px;margin-top:6px;max-width:760px}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;margin:12px 0;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:600;border-bottom:2px solid var(--ink);padding:6px 14px 6px 0;vertical-align:bottom}
td{border-bottom:1px solid var(--line);padding:6px 14px 6px 0;vertical-align:top}
code{background:var(--tint);padding:1px 4px;border-radius:3px;font-size:.92em}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:14px;margin:18px 0}
.cards div{background:var(--tint);border-radius:8px;padding:16px 18px}
.cards b{display:block;font-size:28px;line-height:1.15;margin-bottom:4px}
.cards span{color:var(--soft);font-size:14px}
@media print{nav{display:none}}
"""
