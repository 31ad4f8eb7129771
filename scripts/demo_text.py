"""Documents to blocks: HTML, POD, man pages and Python sources become lists of (kind, text).

Knows file formats; knows nothing of where documents lie, of splits, tokens or models.
A block's kind is h1..h6 (heading), dt (a defined term or signature), p, li (list item) or pre (verbatim).
"""

import html
import re
from html.parser import HTMLParser
from typing import NamedTuple

SKIP_TAGS = {"script", "style", "head", "nav", "footer", "svg", "form", "button"}
# Navigation bars, tables of contents and permalinks, by the class or id the packages' generators give them.
SKIP_NAMES = {
    "headerlink", "sphinxsidebar", "related", "navheader", "navfooter", "docnav", "footer", "toc", "toctree-wrapper",
    "contents", "mobile-nav", "wy-nav-side", "rst-footer-buttons", "wy-breadcrumbs", "menu", "viewcode-link", "linenos",
    "TOC", "navigation", "clearer", "searchbox", "list-of-tables", "list-of-figures", "list-of-examples", "SHORT-TOC",
}  # fmt: skip
BREAKS = {"p", "div", "section", "table", "tr", "ul", "ol", "dl", "dd", "blockquote", "body", "hr", "article", "main"}
HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
CODE = {"code", "tt", "kbd"}


class Block(NamedTuple):
    kind: str
    text: str


class HtmlBlocks(HTMLParser):
    """Collects blocks; a table row is one p block, its cells separated by ` | `."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self.text: list[str] = []
        self.kind = "p"
        self.skipping, self.skip_depth = "", 0
        self.pre_depth = self.cell_depth = 0

    def handle_starttag(self, tag, attrs):
        if self.skipping:
            self.skip_depth += tag == self.skipping
        elif tag in SKIP_TAGS or (tag != "body" and self._names(attrs) & SKIP_NAMES):
            self.skipping, self.skip_depth = tag, 1
        elif tag == "pre":
            self.flush()
            self.kind, self.pre_depth = "pre", self.pre_depth + 1
        elif self.pre_depth:
            self.text.append("\n" if tag == "br" else "")
        elif tag in ("td", "th"):
            self.cell_depth += 1
            self.text.append(" | " if "".join(self.text).strip() else "")
        elif tag in HEADINGS or tag in ("dt", "li"):
            self.flush()
            self.kind = tag
        elif tag in BREAKS and not self.cell_depth:
            self.flush()
        else:
            self.text.append("`" if tag in CODE else " " if tag in BREAKS or tag == "br" else "")

    def handle_endtag(self, tag):
        if self.skipping:
            self.skip_depth -= tag == self.skipping
            self.skipping = self.skipping if self.skip_depth else ""
        elif tag == "pre":
            self.flush()
            self.pre_depth = max(0, self.pre_depth - 1)
        elif self.pre_depth:
            return
        elif tag in ("td", "th"):
            self.cell_depth = max(0, self.cell_depth - 1)
        elif tag in HEADINGS or tag in ("dt", "li") or (tag in BREAKS and not self.cell_depth):
            self.flush()
        elif tag in CODE:
            self.text.append("`")

    def handle_data(self, data):
        if not self.skipping:
            self.text.append(data)

    def flush(self):
        """Ends the current block. An empty one keeps its kind: `<li><p>text` is a list item."""
        raw = "".join(self.text)
        text = raw.strip("\n").rstrip() if self.kind == "pre" else squeeze(raw)
        self.text = []
        if text:
            self.blocks.append(Block(self.kind, text))
            self.kind = "p"

    @staticmethod
    def _names(attrs):
        return {name for key, value in attrs if key in ("class", "id") for name in (value or "").split()}


def squeeze(text):
    text = re.sub(r"``+", "`", text.replace("\N{PILCROW SIGN}", "").replace("\xa0", " "))
    return re.sub(r"\s+", " ", text).strip(" |")


def read_html(source):
    parser = HtmlBlocks()
    parser.feed(source)
    parser.close()
    parser.flush()
    return parser.blocks


def read_pod(source):
    """Perl's POD. Paragraphs that start with white space are verbatim."""
    blocks, active = [], False
    for paragraph in re.split(r"\n[ \t]*\n", source):
        command = re.match(r"=(\w+)[ \t]*(.*)", paragraph.strip(), re.DOTALL)
        if command:
            active = command[1] != "cut"
            heading = re.fullmatch(r"head([1-6])", command[1])
            if heading:
                blocks.append(Block("h" + heading[1], pod_inline(command[2])))
            elif command[1] == "item" and command[2].strip("* \n"):
                blocks.append(Block("dt", pod_inline(command[2])))
        elif active and paragraph[:1] in (" ", "\t"):
            blocks.append(Block("pre", paragraph.strip("\n").rstrip()))
        elif active and paragraph.strip():
            blocks.append(Block("p", pod_inline(paragraph)))
    return [block for block in blocks if block.text]


def pod_inline(text):
    """C<x> becomes `x`; other codes leave their text. Innermost first, so nesting needs no parser."""
    text = re.sub(r"(?s)C<<+ (.*?) >>+", lambda m: "`" + m[1].replace("<", "\0").replace(">", "\1") + "`", text)
    previous = None
    while previous != text:
        previous, text = text, re.sub(r"([A-Z])<+([^<>]*)>+", pod_code, text)
    return squeeze(text.replace("\0", "<").replace("\1", ">"))


def pod_code(match):
    code, inner = match.groups()
    if code in "XZ":
        return ""
    if code == "E":
        return {"lt": "\0", "gt": "\1", "sol": "/", "verbar": "|"}.get(inner, html.unescape(f"&{inner};"))
    if code == "L":
        return inner.split("|")[0]
    return f"`{inner}`" if code == "C" else inner


def read_man(source):
    """Man pages as Pod::Man writes them: .SH/.SS headings, .IP items, .Vb/.Ve verbatim text."""
    blocks, lines, kind = [], [], "p"

    def end(next_kind):
        nonlocal lines, kind
        text = "\n".join(lines).strip("\n") if kind == "pre" else squeeze(" ".join(lines))
        if text:
            blocks.append(Block(kind, text))
        lines, kind = [], next_kind

    for line in source.splitlines():
        macro = re.match(r"\.\s*(SH|SS|IP|Vb|Ve|PP|Sp|TP|RS|RE)\b\s*\"?([^\"]*)", line)
        if macro and macro[1] in ("SH", "SS", "IP") and macro[2].strip():
            end("p")
            text = squeeze(roff_inline(macro[2]))
            if re.search(r"[A-Za-z]", text):
                blocks.append(Block({"SH": "h1", "SS": "h2", "IP": "dt"}[macro[1]], text))
        elif macro:
            end("pre" if macro[1] == "Vb" else "p")
        elif not line.startswith((".", "'")):
            lines.append(roff_inline(line))
    end("p")
    return blocks[1:] if blocks and blocks[0].kind == "p" else blocks  # the preamble of macros


def roff_inline(text):
    text = re.sub(r"\\f(?:\(..|\[.*?\]|.)|\\s[-+]?\d|\\&|\\\||\\\^|\\:", "", text)
    text = re.sub(r"\\\*\(L\"|\\\*\(R\"|\\\(lq|\\\(rq", '"', text)
    text = re.sub(r"\\\*\(--", "--", re.sub(r"\\\*\(C[`']|\\\*\(..", "", text))
    for escape, plain in (("\\-", "-"), ("\\e", "\\"), ("\\(aq", "'"), ("\\(ga", "`"), ("\\ ", " "), ("\\~", " ")):
        text = text.replace(escape, plain)
    return text


def read_plain(source):
    """Python sources, YAML and release notes: kept verbatim, a block per paragraph so that repeats can be dropped."""
    return [Block("raw", part.strip("\n").rstrip()) for part in re.split(r"\n\s*\n", source) if part.strip()]


def render(blocks):
    """Blocks to text: Markdown headings, dashes for items, fences round verbatim text; raw blocks as they were."""
    parts, previous = [], ""
    for kind, text in blocks:
        line = text
        if kind in HEADINGS:
            line = "#" * int(kind[1]) + " " + text
        elif kind == "li":
            line = "- " + text
        elif kind == "pre":
            line = f"```\n{text}\n```"
        parts.append(("\n" if kind == previous == "li" else "\n\n") + line)
        previous = kind
    return "".join(parts).strip("\n")
