"""Packed rows for the eye: tokens, segments and what the loss counts, in a terminal's colours and as an HTML page.

Everything in a row is somebody's text: control characters are shown as pictures, and the page escapes all of it.
"""

import dataclasses
import html
import itertools
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from qcn_jax.chat.tokenizer import IncrementalDecoder, Tokenizer
from qcn_jax.pipeline.report.style import CSS

OPEN, CLOSE = "⟦", "⟧"  # around what the loss counts, where there are no colours
_RESET = "\x1b[0m"
_LOSS = ("\x1b[30;42m", "\x1b[30;102m")  # black on two greens in turn, by token
_WEIGHED = ("\x1b[30;43m", "\x1b[30;103m")  # a weight other than 1: on two yellows
_READ = ("\x1b[0m", "\x1b[2m")  # plain and dim
_ADDED = "\x1b[1;35m"  # bold magenta, where the loss does not count it

_STYLE = """
.row { display:flex; height:14px; border-radius:4px; overflow:hidden; margin:4px 0 12px; background:var(--faint); }
.row i { display:block; border-right:1px solid var(--card); }
pre.tokens i { font-style:normal; border-radius:2px; } pre.tokens i:nth-child(even) { background:var(--code); }
pre.tokens i.l { background:color-mix(in srgb, var(--c2) 38%, transparent); }
pre.tokens i.l:nth-child(even) { background:color-mix(in srgb, var(--c2) 58%, transparent); }
pre.tokens i.w { background:color-mix(in srgb, var(--c4) 38%, transparent); }
pre.tokens i.w:nth-child(even) { background:color-mix(in srgb, var(--c4) 58%, transparent); }
pre.tokens i.a { color:var(--c3); font-weight:650; } pre.tokens s { color:var(--soft); text-decoration:none; }
"""


@dataclasses.dataclass(frozen=True)
class Token:
    """One token.

    Attributes:
      id: in the vocabulary.
      text: as it is shown; of a character that several tokens make, all is the last one's.
      weight: of its prediction in the loss.
      added: whether it is an added token, part of a frame and never of a text.
    """

    id: int
    text: str
    weight: float
    added: bool


@dataclasses.dataclass(frozen=True)
class Segment:
    """A document, or a piece of one, in a row: its source, its column and its tokens."""

    source: str
    column: int
    tokens: list[Token]

    @property
    def counted(self) -> int:
        """Tokens that the loss counts."""
        return sum(token.weight > 0 for token in self.tokens)


@dataclasses.dataclass(frozen=True)
class Row:
    """A packed row: how long it is, and its segments; the rest is padding."""

    length: int
    segments: list[Segment]

    @property
    def padding(self) -> int:
        """Positions without a token."""
        return self.length - sum(len(segment.tokens) for segment in self.segments)


def read_back(row: Mapping[str, np.ndarray], tokenizer: Tokenizer, sources: Sequence[str]) -> Row:
    """Reads a row of `loader.batches`.

    Args:
      row: tokens, segment_ids, weights and source [T].
      tokenizer: of its tokens.
      sources: names by the numbers in `source`.
    """
    added, segments = set(tokenizer.added_tokens.values()), []
    for number in range(1, int(row["segment_ids"].max(initial=0)) + 1):
        at = np.flatnonzero(row["segment_ids"] == number)
        ids = row["tokens"][at].tolist()
        weights = [0.0, *row["weights"][at][:-1].tolist()]  # position t is of the prediction of t + 1
        decoder = IncrementalDecoder(tokenizer)
        texts = [decoder.push(id_) for id_ in ids]
        texts[-1] += decoder.finish()
        tokens = [Token(id_, visible(text), weight, id_ in added)
                  for id_, text, weight in zip(ids, texts, weights, strict=True)]
        segments.append(Segment(sources[int(row["source"][at[0]])], int(at[0]), tokens))
    return Row(len(row["tokens"]), segments)


def visible(text: str) -> str:
    """`text` with what would steer a terminal or turn the direction of reading as pictures or numbers."""
    if text.isprintable():
        return text
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def to_terminal(rows: Sequence[Row], most: int, colour: bool) -> Iterator[str]:
    """Lines that show `rows`.

    Args:
      rows: what is shown.
      most: tokens of a segment, half of them from its end; 0 for all.
      colour: whether escape sequences may be used; otherwise OPEN and CLOSE stand around what the loss counts, with
        its weight where that is not 1.
    """
    strong = (lambda text: f"\x1b[1m{text}{_RESET}") if colour else str
    yield (f"{_LOSS[0]}counted in the loss{_RESET} {_WEIGHED[0]}with a weight other than 1{_RESET} {_ADDED}added token"
           f"{_RESET}" if colour else f"{OPEN}counted in the loss{CLOSE}, {OPEN}0.5|with this weight{CLOSE}")
    for number, row in enumerate(rows, 1):
        yield strong(f"row {number} of {len(rows)}: {_of_row(row)}")
        for place, segment in enumerate(row.segments, 1):
            yield strong(f"-- segment {place}, {_of_segment(segment)}")
            first, left_out, last = _ends(segment.tokens, most)
            write = _coloured if colour else _bracketed
            yield write(first) + (f" … {left_out:,} tokens … {write(last)}" if left_out else "")
        yield ""


def to_page(rows: Sequence[Row], most: int, title: str, lines: Sequence[str]) -> str:
    """A page that shows `rows` and holds all that it needs.

    Args:
      rows, most: see `to_terminal`.
      title: of the page.
      lines: what is said above the rows.
    """
    names = list(dict.fromkeys(segment.source for row in rows for segment in row.segments))
    colours = {name: f"var(--c{number % 8})" for number, name in enumerate(names)}
    legend = "".join(f'<span><i style="background:{colours[name]}"></i>{html.escape(name)}</span>' for name in names)
    said = "".join(f"<p>{html.escape(visible(line))}</p>" for line in lines)
    body = "".join(_section(number, row, most, colours) for number, row in enumerate(rows, 1))
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(title)}</title><style>{CSS}{_STYLE}</style></head>\n"
            f"<body><main><header><h1>{html.escape(title)}</h1>{said}"
            '<div class="legend"><span><i style="background:var(--c2)"></i>counted in the loss</span>'
            '<span><i style="background:var(--c4)"></i>counted with a weight other than 1</span>'
            '<span>the rest is only read; point at a token for its id and weight</span></div>'
            f'<div class="legend">sources: {legend}</div></header>{body}</main></body></html>\n')


def _of_row(row: Row) -> str:
    counted = sum(segment.counted for segment in row.segments)
    return (f"{row.length:,} positions, {len(row.segments)} segments, {counted:,} tokens in the loss, "
            f"{row.padding:,} positions of padding")


def _of_segment(segment: Segment) -> str:
    return (f"{segment.source}, {len(segment.tokens):,} tokens from position {segment.column:,} on, "
            f"{segment.counted:,} in the loss")


def _ends(tokens: Sequence[Token], most: int) -> tuple[Sequence[Token], int, Sequence[Token]]:
    """The beginning, how many tokens are left out, and the end."""
    if not most or len(tokens) <= most:
        return tokens, 0, ()
    last = most // 2
    return tokens[:most - last], len(tokens) - most, tokens[len(tokens) - last:]


def _coloured(tokens: Sequence[Token]) -> str:
    parts = []
    for number, token in enumerate(tokens):
        if token.weight:
            style = (_LOSS if token.weight == 1 else _WEIGHED)[number % 2]
        else:
            style = _ADDED if token.added else _READ[number % 2]
        # A background must not run on to the end of a line, whose end is part of the token.
        parts += [f"{style}{_line_ends(token.text)}{_RESET}".replace("\n", f"{_RESET}\n{style}")]
    return "".join(parts)


def _bracketed(tokens: Sequence[Token]) -> str:
    parts = []
    for weight, run in itertools.groupby(tokens, lambda token: token.weight):
        text = "".join(token.text for token in run)
        note = "" if weight == 1 else f"{weight:g}|"
        parts.append(f"{OPEN}{note}{text}{CLOSE}" if weight else text)
    return "".join(parts)


def _line_ends(text: str) -> str:
    return text.replace("\n", "↵\n")


def _section(number: int, row: Row, most: int, colours: Mapping[str, str]) -> str:
    share = lambda count: f"{100 * count / row.length:.3f}%"
    bar = "".join(f'<i title="segment {place}, {html.escape(_of_segment(segment))}" style="width:'
                  f'{share(len(segment.tokens))};background:{colours[segment.source]}"></i>'
                  for place, segment in enumerate(row.segments, 1))
    parts = []
    for place, segment in enumerate(row.segments, 1):
        first, left_out, last = _ends(segment.tokens, most)
        gap = f"<s> … {left_out:,} tokens … </s>" if left_out else ""
        tokens = f'<pre class="tokens">{_marked(first)}{gap}{_marked(last)}</pre>'
        parts.append(f"<details open><summary>segment {place}, {html.escape(_of_segment(segment))}</summary>"
                     f'<div class="turns">{tokens}</div></details>')
    return (f'<section><h2>Row {number}</h2><p class="sub">{_of_row(row)}</p><div class="row">{bar}</div>'
            f"{''.join(parts)}</section>")


def _marked(tokens: Sequence[Token]) -> str:
    return "".join(map(_token, tokens))


def _token(token: Token) -> str:
    kinds = [name for name, holds in (("l", token.weight == 1), ("w", token.weight not in (0, 1)), ("a", token.added))
             if holds]
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    weight = f" · weight {token.weight:g}" if token.weight else ""
    return f'<i{kind} title="{token.id}{weight}">{_line_ends(html.escape(token.text))}</i>'
