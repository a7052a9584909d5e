"""Web pages rewritten to Markdown: a model chooses form and leaves out what is beside the matter, and adds nothing."""

import re
from collections.abc import Mapping
from typing import Any

from qcn_jax.agents.writing.kind import Item, Made
from qcn_jax.agents.writing.page import Page, joined, read_page, tokens
from qcn_jax.chat.asking import Ask

LEAST_KEPT = 0.9  # share of the matter's tokens that a rewriting keeps
SHOWN = 60_000  # characters of a page
_SYSTEM = """You turn web pages into clean Markdown. Keep every word, number, link and block of code of the matter as
it is, in its order; leave out navigation, advertisements and footers. Add nothing: no summary, no remark, no heading
that the page does not have. Answer with the Markdown alone."""
_FENCE = re.compile(r"^(`{3,}|~{3,})[^\n]*\n(.*?)^\1[`~]*[ \t]*$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"!?\[([^\]]*)\]\(\s*<?([^)\s>]*)>?(?:\s+[\"'(]([^\"')]*)[\"')])?\s*\)")
_BARE = re.compile(r"<?(https?://[^\s>)\]]+)>?")
_LEAD = re.compile(r"^\s*(?:>\s*)*(?:#{1,6}\s+|[-*+]\s+(?:\[[ xX]\]\s+)?|\d{1,3}[.)]\s+)?")
_RULE = re.compile(r"^\s*\|?[\s:|*_=-]*$")
_ESCAPE = re.compile(r"\\([\\`*_{}\[\]()#+.!|<>~-])")


class Rewrite:
    """Pages to Markdown, an ordinary source of texts."""

    name, fields = "rewrite", {"text": str}

    def check(self, fields: Mapping[str, Any]) -> str:
        """See Kind."""
        return "" if read_page(fields["text"]).main else "field text: shows nothing"

    def make(self, item: Item, ask: Ask, seed: int) -> Made:
        """See Kind."""
        text = item.fields["text"]
        if len(text) > SHOWN:
            return Made(dropped={"too long": 1})
        answer = ask([{"role": "system", "content": _SYSTEM}, {"role": "user", "content": text}], seed).strip()
        whole = re.fullmatch(r"```(?:markdown|md)\n(.*?)\n?```", answer, re.DOTALL)  # some put all of it into a fence
        markdown = whole[1] if whole else answer
        if problem := difference(read_page(text), markdown):
            return Made(dropped={problem: 1})
        kept = {name: value for name, value in item.fields.items() if name not in ("text", "id")}
        return Made([{**kept, "id": item.name, "text": markdown + "\n"}])


def difference(page: Page, markdown: str) -> str:
    """How a rewriting differs in content from its page; empty where it does not.

    Every line, a table's rows among them, must say word for word something that stands in the page as it is and behind
    what the line before says; links and code must be the page's; and LEAST_KEPT of the matter and all of its code must
    be there.

    Returns:
      code, link, invented, order or incomplete; "" for none.
    """
    plain = lambda code: "\n".join(line.rstrip() for line in code.strip("\n").splitlines())
    code = [plain(match[2]) for match in _FENCE.finditer(markdown)]
    theirs = [plain(text) for text in page.code]
    if not set(code) <= set(theirs):
        return "code"
    text = _FENCE.sub("\n", markdown)
    urls = {match[2] for match in _LINK.finditer(text)}
    text = _LINK.sub(lambda match: f"{match[1]} \n{match[3] or ''}\n" if match[3] else match[1], text)
    urls |= {url for url in _BARE.findall(text) if not page.says(url)}
    if not all(url in page.urls for url in urls if url):
        return "link"
    text = _BARE.sub(lambda match: match[0] if page.says(match[1]) else " ", text)
    said: list[str] = []
    at = 0  # in what the page says, up to which it has been said
    for line in text.splitlines():
        if _RULE.match(line):
            continue
        found = tokens(_ESCAPE.sub(r"\1", _LEAD.sub("", line)))
        if not found:
            continue
        start = page.said.find(joined(found), at)
        if start < 0:
            return "order" if page.says(line) else "invented"
        at = start + len(joined(found)) - 1
        said += found
    whole, sizes = joined(said), {number: len(tokens(page.blocks[number])) for number in page.main}
    kept = sum(size for number, size in sizes.items() if joined(tokens(page.blocks[number])) in whole)
    if kept < LEAST_KEPT * sum(sizes.values()) or set(theirs) - set(code):
        return "incomplete"
    return ""
