"""Byte-level BPE tokenizers: the published Qwen one, and small ones trained on a corpus.

The work is done by the `tokenizers` library; this module fixes how such a tokenizer is built (pre-tokeniser,
normaliser, added tokens, merges from tiktoken ranks) and which text may turn into added tokens.
"""

import base64
import binascii
import codecs
import functools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers

from qcn_jax import files
from qcn_jax.chat.values import encodable
from qcn_jax.errors import UserError

# Qwen2/Qwen3 pre-tokeniser: contractions, words, single digits, punctuation runs, line ends, spaces.
PRETOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)
# All added tokens of Qwen3, in id order from 151643; those after QWEN_SPECIAL are not "special".
QWEN_ADDED = QWEN_SPECIAL + (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TOKENIZER_FILE = "tokenizer.json"
_FALLBACK = re.compile("<0x([0-9A-Fa-f]{2})>")  # how byte-fallback vocabularies spell a byte


class Tokenizer:
    """A tokenizer; `vocab_size` counts added tokens (model embeddings may have more rows).

    Texts are encoded whole: truncation and padding that a tokenizer.json holds are off.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        backend.no_truncation()  # stored with the file, and nothing that a caller asked for
        backend.no_padding()
        self._backend = backend
        self._added = {token.content: id_ for id_, token in backend.get_added_tokens_decoder().items()}

    @property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included."""
        return self._vocab_size

    @functools.cached_property
    def _vocab_size(self) -> int:
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def known_ids(self, size: int) -> np.ndarray:
        """Which of the ids 0 .. size - 1 have a token, [size] bool; models often have more rows than that."""
        known = np.zeros(size, bool)
        ids = np.fromiter(self._backend.get_vocab(with_added_tokens=True).values(), np.int64)
        known[ids[ids < size]] = True
        return known

    @property
    def added_tokens(self) -> dict[str, int]:
        """Added tokens and their ids, in id order."""
        return dict(sorted(self._added.items(), key=lambda item: item[1]))

    @property
    def special_tokens(self) -> set[str]:
        """Added tokens that belong to the frame of texts and turns, not to texts."""
        return {token.content for token in self._backend.get_added_tokens_decoder().values() if token.special}

    @functools.cached_property
    def _ordinary(self) -> tokenizers.Tokenizer:
        """The same model without its added tokens: their text is text like any other."""
        description = json.loads(self._backend.to_str())
        description["added_tokens"] = []
        model = description["model"]
        if isinstance(model.get("vocab"), dict):  # `_placed` puts them there; no merge makes them
            made = {"".join(merge) for merge in model.get("merges", ())}
            made.add(model.get("unk_token"))
            lone = {token for token in self._added if len(token) > 1 and token not in made}
            model["vocab"] = {token: id_ for token, id_ in model["vocab"].items() if token not in lone}
        return tokenizers.Tokenizer.from_str(json.dumps(description))

    def encode(self, text: str) -> list[int]:
        """Ids of trusted `text`: added tokens written in it become their ids."""
        return self._backend.encode(encodable(text), add_special_tokens=False).ids

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of untrusted `text`: no added token results, whatever the text spells."""
        return self._ordinary.encode(encodable(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], ordinary: bool = False) -> list[list[int]]:
        """`encode` (or `encode_ordinary`) of many texts on all cores."""
        backend = self._ordinary if ordinary else self._backend
        batch = backend.encode_batch_fast([encodable(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, added tokens included; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode([int(id_) for id_ in ids], skip_special_tokens=False)

    def token_bytes(self, id_: int) -> bytes:
        """The bytes that one id stands for; empty for an id beyond the vocabulary (a dead embedding row)."""
        token = self._backend.id_to_token(int(id_))
        if token is None:
            return b""
        if token in self._added:
            return token.encode()
        if self._is_byte_level:
            spelled = [_char_to_byte().get(char) for char in token]
            return token.encode() if None in spelled else bytes(spelled)  # as the library reads what is no spelling
        if byte := _FALLBACK.fullmatch(token):
            return bytes([int(byte[1], 16)])
        spell = self._backend.decoder.decode if self._backend.decoder is not None else " ".join
        return spell(["a", token]).removeprefix("a").encode()  # a decoder may strip the first token of a text

    @functools.cached_property
    def _is_byte_level(self) -> bool:
        decoder = json.loads(self._backend.to_str()).get("decoder") or {}
        return "ByteLevel" in {part["type"] for part in (decoder, *decoder.get("decoders", ()))}

    def id(self, token: str) -> int:
        """Id of one token given by its text (an added token) or by its byte-level spelling.

        Raises:
          UserError: there is no such token.
        """
        id_ = self._backend.token_to_id(token)
        if id_ is None:
            raise UserError(f"tokenizer: has no token {token!r}")
        return id_

    def save(self, path: files.Path) -> None:
        """Writes tokenizer.json (Hugging Face's format) to `path`, a file name or an existing folder."""
        path = pathlib.Path(path)
        files.write_text(path / TOKENIZER_FILE if path.is_dir() else path, self._backend.to_str())

    @classmethod
    def from_file(cls, path: files.Path) -> "Tokenizer":
        """Reads a tokenizer.json; raises UserError where it is missing or is none."""
        text = _read(path)
        try:
            backend = tokenizers.Tokenizer.from_str(text)
            rows = {row["content"]: (row["id"], row["special"]) for row in json.loads(text)["added_tokens"]}
            return cls(_placed(backend, rows, path))
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            raise UserError(f"{path}: is not a tokenizer.json: {_first_line(error)}") from error

    @classmethod
    def from_folder(cls, folder: files.Path) -> "Tokenizer":
        """Reads a Hugging Face folder: tokenizer.json, or vocab.json and merges.txt, or qwen.tiktoken.

        Added tokens that tokenizer_config.json or added_tokens.json lists besides are added, with the ids given there.

        Raises:
          UserError: none of these is there, or one is damaged; the line names the file.
        """
        folder = pathlib.Path(folder)
        if files.is_file(folder / TOKENIZER_FILE):
            backend, listed = cls.from_file(folder / TOKENIZER_FILE)._backend, _listed(folder)
            for content, (id_, _) in listed.items():
                if backend.token_to_id(content) not in (None, id_):
                    raise UserError(f"{folder}: {content!r} has id {backend.token_to_id(content)} in {TOKENIZER_FILE} "
                                    f"and {id_} in a file beside it")
            return cls(_placed(backend, listed, folder))
        if files.is_file(folder / "vocab.json") and files.is_file(folder / "merges.txt"):
            return cls(_from_vocab_and_merges(folder))
        if files.is_file(folder / "qwen.tiktoken"):
            return cls.from_tiktoken(folder / "qwen.tiktoken")
        raise UserError(f"{folder}: holds no tokenizer.json, no vocab.json with merges.txt and no qwen.tiktoken")

    @classmethod
    def from_tiktoken(cls, path: files.Path, added_tokens: Sequence[str] = QWEN_ADDED) -> "Tokenizer":
        """Builds the tokenizer from a tiktoken file of ranks (lines `base64 rank`) and its added tokens."""
        ranks = _read_ranks(path)
        vocab = {_spell(token): rank for token, rank in ranks.items()}
        merges = [(_spell(left), _spell(right)) for left, right in _merges(ranks, path)]
        return cls(_assemble(tokenizers.models.BPE(vocab, merges), added_tokens))

    @staticmethod
    def smallest(added_tokens: Sequence[str]) -> int:
        """The smallest vocabulary that `train` makes: every byte and the added tokens."""
        return 256 + len(added_tokens)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, added_tokens: Sequence[str]) -> "Tokenizer":
        """Trains a byte-level BPE with `vocab_size` ids in all: 256 bytes, merges, then the added tokens.

        Ids of added tokens come last and in the order given, as Qwen's do. Text is not normalised: source
        code must come back byte for byte. A small corpus may yield fewer merges than asked for.

        Raises:
          UserError: `vocab_size` has no room for the bytes and the added tokens.
        """
        smallest = cls.smallest(added_tokens)
        if vocab_size < smallest:
            raise UserError(f"--config.tokenizer.vocab_size: must be at least {smallest}, got {vocab_size}")
        tokenizer = _assemble(tokenizers.models.BPE(), (), normalizer=None)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - len(added_tokens), show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
        tokenizer.train_from_iterator((encodable(text) for text in texts), trainer)
        return cls(_with_added(tokenizer, added_tokens))


class IncrementalDecoder:
    """Turns a stream of ids into text, holding back bytes until they make whole characters."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._first = True

    def push(self, id_: int) -> str:
        """Text that `id_` completes; empty while a character is still open."""
        text = self._decoder.decode(self._tokenizer.token_bytes(id_))
        if self._first and text:
            self._first = False
            if text[0] == " " and not self._tokenizer.decode([id_]).startswith(" "):
                return text[1:]  # a decoder that strips the first space of a text
        return text

    def finish(self) -> str:
        """U+FFFD for a character left open at the end of the stream, else nothing; then starts anew."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._first = True
        return text


def _assemble(model: tokenizers.models.Model, added_tokens: Sequence[str],
              normalizer: Any = tokenizers.normalizers.NFC()) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(PRETOKENIZER), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    backend.decoder = tokenizers.decoders.ByteLevel()
    return _with_added(backend, added_tokens)


def _with_added(backend: tokenizers.Tokenizer, added_tokens: Sequence[str]) -> tokenizers.Tokenizer:
    special = set(QWEN_SPECIAL)
    backend.add_tokens([
        tokenizers.AddedToken(token, normalized=False, special=token in special) for token in added_tokens])
    return backend


def _from_vocab_and_merges(folder: pathlib.Path) -> tokenizers.Tokenizer:
    """The slow-tokenizer layout; added tokens are Qwen's where no file lists any."""
    vocab = files.read_json(folder / "vocab.json")
    if not isinstance(vocab, dict):
        raise UserError(f"{folder}/vocab.json: expected a JSON object of tokens and their ids")
    lines = _read(folder / "merges.txt").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    listed = _listed(folder)
    try:
        backend = _assemble(tokenizers.models.BPE(vocab, merges), () if listed else QWEN_ADDED)
    except Exception as error:
        raise UserError(f"{folder}/merges.txt: does not fit vocab.json: {_first_line(error)}") from error
    return _placed(backend, listed, folder)


def _listed(folder: pathlib.Path) -> dict[str, tuple[int, bool]]:
    """Added tokens that added_tokens.json and tokenizer_config.json list: id, and whether they are special."""
    rows: dict[str, tuple[int, bool]] = {}
    for name, key in (("added_tokens.json", None), ("tokenizer_config.json", "added_tokens_decoder")):
        path = folder / name
        values = files.read_json(path) if files.is_file(path) else {}
        listed = values.get(key) or {} if key and isinstance(values, dict) else values
        if not isinstance(listed, dict):
            raise UserError(f"{path}: expected a JSON object{f', and one as its {key}' if key else ''}")
        try:
            if key is None:
                found = [(token, id_, token in QWEN_SPECIAL) for token, id_ in listed.items()]
            else:
                found = [(row["content"], int(id_), bool(row.get("special"))) for id_, row in listed.items()]
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: lists an added token without its id or content: {_first_line(error)}") from error
        for content, id_, special in found:
            if not isinstance(content, str) or not content or type(id_) is not int or not 0 <= id_ < 2**31:
                raise UserError(f"{path}: lists an added token without its id or content: {content!r} as {id_!r}")
            if rows.setdefault(content, (id_, special))[0] != id_:
                raise UserError(f"{path}: gives {content!r} the ids {rows[content][0]} and {id_}")
            rows[content] = (id_, special)
    return rows


def _placed(backend: tokenizers.Tokenizer, rows: dict[str, tuple[int, bool]], source: files.Path
            ) -> tokenizers.Tokenizer:
    """`backend` whose added tokens have the ids of `rows` (content -> id, special).

    The library numbers them one behind the other, whatever the file says, but for those in the model's vocabulary.
    """
    if all(backend.token_to_id(content) == id_ for content, (id_, _) in rows.items()):
        return backend
    description = json.loads(backend.to_str())
    added = {row["content"]: row for row in description["added_tokens"]}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for content, (id_, special) in rows.items():
        added[content] = {"content": content, **plain, "special": special, **added.get(content, {}), "id": id_}
    vocab = description["model"].get("vocab")
    if not isinstance(vocab, dict):
        raise UserError(f"{source}: ids of added tokens must follow those of the vocabulary without a gap")
    owners = {id_: token for token, id_ in vocab.items()}
    for content, row in added.items():
        other = owners.setdefault(row["id"], content)
        if other != content or vocab.get(content, row["id"]) != row["id"]:
            raise UserError(f"{source}: added token {content!r} has id {row['id']}, which does not fit the vocabulary: "
                            f"{other!r} has it" if other != content else
                            f"{source}: added token {content!r} has id {row['id']} and {vocab[content]}")
        vocab[content] = row["id"]
    description["added_tokens"] = sorted(added.values(), key=lambda row: row["id"])
    return tokenizers.Tokenizer.from_str(json.dumps(description))


def _read_ranks(path: files.Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(f"{path}:{number}: expected a base64 token and its rank") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or sum(len(token) == 1 for token in ranks) != 256:
        raise UserError(f"{path}: ranks must be 0 .. n-1 and cover all 256 single bytes")
    return ranks


def _merges(ranks: dict[bytes, int], path: files.Path) -> Iterator[tuple[bytes, bytes]]:
    """The merge that makes each token: byte pair encoding with lower ranks only, until two parts remain."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            if ranks.get(parts[best] + parts[best + 1], rank) >= rank:
                raise UserError(f"{path}: token of rank {rank} is not made of two tokens of lower rank")
            parts[best:best + 2] = [parts[best] + parts[best + 1]]
        yield parts[0], parts[1]


@functools.cache
def _byte_to_char() -> dict[int, str]:
    """GPT-2's byte alphabet: printable Latin-1 stands for itself, other bytes for 256, 257, ... in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(printable))
    return table


@functools.cache
def _char_to_byte() -> dict[str, int]:
    return {char: byte for byte, char in _byte_to_char().items()}


def _spell(token: bytes) -> str:
    return "".join(map(_byte_to_char().__getitem__, token))


def _read(path: files.Path) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
