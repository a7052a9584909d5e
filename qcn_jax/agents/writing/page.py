"""Web pages and plain documents as tokens, blocks, code and links: what a rewriting of them may hold."""

import dataclasses
import functools
import html.parser
import re
from collections.abc import Sequence

_BLOCKS = frozenset({"p", "li", "h1", "h2", "h3", "h4", "h5", "h6", "td", "th", "dt", "dd", "blockquote", "figcaption",
                     "caption", "summary", "div", "section", "article", "main", "title", "ul", "ol", "table", "tr",
                     "pre", "br", "hr", "header", "footer", "nav", "aside", "form", "body"})
_UNSEEN = frozenset({"script", "style", "template", "noscript", "head"})
_ASIDE = frozenset({"nav", "footer", "aside", "form"})  # may be left out
# Numbers whole and with their sign, words, and signs that mean something; no punctuation.
_TOKEN = re.compile(r"(?<!\w)-?\d+(?:[.,:]\d+)*|[^\W_]+|[%$€£<>=+]")
_HTML = re.compile(r"<(?:!doctype html|html|body|p|div|h[1-6]|article|main)\b", re.IGNORECASE)


def tokens(text: str) -> list[str]:
    """What a text says, whatever its case, emphasis and punctuation."""
    return _TOKEN.findall(text.casefold())


@dataclasses.dataclass(frozen=True)
class Page:
    """A document.

    Attributes:
      blocks: texts in their order, those beside the matter (navigation, footers) included.
      main: the numbers of those that a rewriting must keep.
      code: preformatted texts.
      urls: of links and pictures, as they are written.
    """

    blocks: Sequence[str]
    main: Sequence[int]
    code: Sequence[str]
    urls: frozenset[str]

    @functools.cached_property
    def said(self) -> str:
        """All tokens, a blank around each."""
        return joined([token for block in (*self.blocks, *self.code) for token in tokens(block)])

    def says(self, text: str) -> bool:
        """Whether the tokens of `text` stand there one behind the other."""
        return joined(tokens(text)) in self.said


def joined(found: Sequence[str]) -> str:
    """Tokens as one text in which others can be looked for."""
    return f" {' '.join(found)} " if found else ""


def read_page(text: str) -> Page:
    """A page of HTML, or a plain text or Markdown whose paragraphs are its blocks."""
    if _HTML.search(text[:4000]):
        reader = _Reader()
        reader.feed(text)
        reader.close()
        return reader.page()
    code = [block.strip("\n") for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
    plain = re.sub(r"^```[^\n]*\n.*?^```[^\n]*$", "", text, flags=re.DOTALL | re.MULTILINE)
    blocks = [block for part in re.split(r"\n\s*\n", plain) if (block := part.strip())]
    return Page(blocks, range(len(blocks)), code, frozenset(re.findall(r"https?://[^\s)>\]\"']+", text)))


class _Reader(html.parser.HTMLParser):
    """Collects what a page shows."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._blocks: list[str] = []
        self._main: list[int] = []
        self._code: list[str] = []
        self._urls: set[str] = set()
        self._text, self._open = "", []  # of the block under way; tags that matter

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begins a block, notes links."""
        values = dict(attrs)
        self._urls |= {url for name in ("href", "src") if (url := values.get(name))}
        if tag == "img" and values.get("alt"):
            self._text += f" {values['alt']} "
        if tag in _BLOCKS and "pre" not in self._open:
            self._end()
        if tag in _UNSEEN or tag in _ASIDE or tag == "pre":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Ends a block."""
        if tag == "pre" and "pre" in self._open:
            if not self._unseen and (code := self._text.strip("\n")):
                self._code.append(code)
            self._text = ""
        elif tag in _BLOCKS and "pre" not in self._open:
            self._end()
        if tag in self._open:
            del self._open[len(self._open) - 1 - self._open[::-1].index(tag)]

    def handle_data(self, data: str) -> None:
        """Text."""
        if not self._unseen:
            self._text += data

    @property
    def _unseen(self) -> bool:
        return any(tag in _UNSEEN for tag in self._open)

    def _end(self) -> None:
        if text := " ".join(self._text.split()):
            if not any(tag in _ASIDE for tag in self._open):
                self._main.append(len(self._blocks))
            self._blocks.append(text)
        self._text = ""

    def page(self) -> Page:
        """What was collected."""
        self._end()
        return Page(self._blocks, self._main, self._code, frozenset(self._urls))
