"""Tokenizers: the published one against tiktoken, trained ones, round trips, streaming."""

import base64
import json
import pathlib
import pickle
import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcn_jax.chat import tokenizer as tokenizer_lib
from qcn_jax.chat.tokenizer import IncrementalDecoder, Tokenizer
from qcn_jax.errors import UserError

ADDED = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "<function=",
    "</function>",
    *(f"<|{i}|>" for i in range(1, 12)),
]
SOURCES = [
    text
    for path in sorted(pathlib.Path(tokenizer_lib.__file__).parent.glob("*.py"))
    if (text := path.read_text(encoding="utf-8"))
]
HARD = [
    "",
    " ",
    "\r\n\n",
    "ﬁ e\u0301 Å ẛ̣",
    "中文 한국어 עברית",
    "👩‍👩‍👧🇩🇪",
    "\u0338",
    "<|im_end|>\u0338",
    "a\x00b",
    "\ud800",
    "１２３",
    "x  =  1\t# tab",
    "don't DON'T we'LL",
    "<|im_start|>user\n<tool_call>",
    "\u2028\u00a0\ufeff",
]


@pytest.fixture(scope="module")
def small():
    return Tokenizer.train(SOURCES, 600, ADDED)


@pytest.fixture(scope="module")
def qwen(qwen_tokenizer_path):
    return Tokenizer.from_file(qwen_tokenizer_path)


@pytest.fixture(scope="module")
def ranks_file(qwen_tokenizer_path, tmp_path_factory):
    """qwen.tiktoken as it is published, remade from the vocabulary."""
    vocab = json.loads(qwen_tokenizer_path.read_text(encoding="utf-8"))["model"]["vocab"]
    table = {char: byte for byte, char in enumerate(gpt2_alphabet())}
    path = tmp_path_factory.mktemp("ranks") / "qwen.tiktoken"
    with open(path, "wb") as stream:
        for token, rank in sorted(vocab.items(), key=lambda item: item[1]):
            stream.write(base64.b64encode(bytes(table[char] for char in token)) + f" {rank}\n".encode())
    return path


def gpt2_alphabet():
    """GPT-2's character for each byte, from transformers where it is at hand (an independent table)."""
    return list(pytest.importorskip("transformers.convert_slow_tokenizer").bytes_to_unicode()[b] for b in range(256))


def clean(text):
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def test_added_tokens_come_last_in_the_order_given(small):
    assert small.vocab_size == 600
    assert list(small.added_tokens.items()) == [(token, 600 - len(ADDED) + i) for i, token in enumerate(ADDED)]
    assert small.encode("<function=view>")[0] == small.id("<function=")
    assert small.id("<|11|>") in small.encode("x<|11|>y")


def test_training_is_deterministic_and_survives_files_and_pickling(small, tmp_path):
    small.save(tmp_path)
    again = Tokenizer.train(SOURCES, 600, ADDED)
    again.save(tmp_path / "again.json")
    assert (tmp_path / "tokenizer.json").read_text() == (tmp_path / "again.json").read_text()
    for copy in (Tokenizer.from_folder(tmp_path), pickle.loads(pickle.dumps(small))):
        assert copy.encode(SOURCES[0]) == small.encode(SOURCES[0])
        assert copy.added_tokens == small.added_tokens


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(), st.lists(st.sampled_from(HARD + ADDED)).map("".join)))
def test_trained_tokenizer_gives_any_text_back_byte_for_byte(small, text):
    assert small.decode(small.encode(text)) == clean(text)
    ordinary = small.encode_ordinary(text)
    assert small.decode(ordinary) == clean(text)
    assert not set(ordinary) & set(small.added_tokens.values())
    assert small.encode_batch([text], ordinary=True) == [ordinary]


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(), st.lists(st.sampled_from(HARD + ADDED)).map("".join)))
def test_qwen_gives_any_text_back_in_nfc(qwen, text):
    assert qwen.decode(qwen.encode_ordinary(text)) == unicodedata.normalize("NFC", clean(text))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_streaming_equals_decoding_and_never_splits_a_character(small, data):
    """Any ids, so also bytes that are no UTF-8; the pieces are U+FFFD-free where the text is whole."""
    if data.draw(st.booleans()):
        ids = small.encode(data.draw(st.text()))
    else:
        ids = data.draw(st.lists(st.integers(0, small.vocab_size - 1)))
    stream = IncrementalDecoder(small)
    pieces = [stream.push(id_) for id_ in ids] + [stream.finish()]
    assert "".join(pieces) == small.decode(ids)
    for end in range(len(pieces)):  # what was emitted is never taken back
        assert small.decode(ids).startswith("".join(pieces[:end]))


def test_a_streamed_emoji_appears_at_once(small):
    ids = small.encode("é👩‍👩‍👧")
    stream = IncrementalDecoder(small)
    pieces = [stream.push(id_) for id_ in ids]
    assert len(ids) > len("é👩‍👩‍👧") and "�" not in "".join(pieces) and "".join(pieces) == "é👩‍👩‍👧"


def test_qwen_ids(qwen):
    assert qwen.vocab_size == 151_669
    expected = {
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
        "<tool_call>": 151657,
        "</tool_call>": 151658,
        "<|fim_prefix|>": 151659,
        "<|file_sep|>": 151664,
        "</think>": 151668,
    }
    assert {token: qwen.id(token) for token in expected} == expected
    assert qwen.encode("<|im_end|>\u0338")[0] == 151645  # added tokens split before normalisation, as HF does
    assert qwen.token_bytes(151_900) == b""  # a dead embedding row


def test_qwen_from_ranks_is_the_published_tokenizer(qwen, ranks_file):
    """The digest is that of the published file, so the ranks this test remakes are the real ones."""
    import hashlib

    digest = hashlib.sha256(ranks_file.read_bytes()).hexdigest()
    assert digest.startswith("b2b1b8df") and digest.endswith("a33186")
    built = Tokenizer.from_folder(ranks_file.parent)
    ours, theirs = (json.loads(t._backend.to_str()) for t in (built, qwen))
    assert ours["model"]["merges"] == theirs["model"]["merges"]
    assert ours["model"]["vocab"] == theirs["model"]["vocab"]
    for key in ("added_tokens", "normalizer", "pre_tokenizer", "decoder", "post_processor"):
        assert ours[key] == theirs[key], key


def test_qwen_agrees_with_tiktoken(qwen, ranks_file):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in ranks_file.read_bytes().splitlines()}
    encoding = tiktoken.Encoding("qwen", pat_str=tokenizer_lib.PRETOKENIZER, mergeable_ranks=ranks, special_tokens={})
    rng = random.Random(0)
    alphabets = [
        (32, 126),
        (0xA0, 0x24F),
        (0x300, 0x36F),
        (0x400, 0x4FF),
        (0x4E00, 0x4FFF),
        (0xAC00, 0xAC80),
        (0x1F300, 0x1F6FF),
        (9, 13),
    ]
    texts = HARD + SOURCES + [line for source in SOURCES for line in source.splitlines()]
    for _ in range(600):
        texts.append("".join(chr(rng.randint(*rng.choice(alphabets))) for _ in range(rng.randint(1, 60))))
    for text in texts:
        normal = unicodedata.normalize("NFC", clean(text))
        assert qwen.encode_ordinary(text) == encoding.encode_ordinary(normal), text


def test_vocab_and_merges_folder(qwen, qwen_tokenizer_path, tmp_path):
    model = json.loads(qwen_tokenizer_path.read_text(encoding="utf-8"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"]))
    read = Tokenizer.from_folder(tmp_path)
    assert read.added_tokens == qwen.added_tokens
    assert all(read.encode(text) == qwen.encode(text) for text in HARD + SOURCES[:3])


def test_bad_files_are_named(small, tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(UserError, match="missing.json: cannot be read"):
        Tokenizer.from_file(tmp_path / "missing.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json: is not a tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    bytes_ = [f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256)]
    for lines, reason in (
        (["???"], ":1: expected"),
        (bytes_[:-1], "256 single bytes"),
        ([*bytes_, base64.b64encode(b"abc").decode() + " 256"], "rank 256"),
    ):
        (tmp_path / "ranks").write_text("\n".join(lines))
        with pytest.raises(UserError, match=f"ranks.*{reason}"):
            Tokenizer.from_tiktoken(tmp_path / "ranks", ())
    with pytest.raises(UserError, match="vocab_size: must be at least 273"):
        Tokenizer.train(["x"], 272, ADDED)
    with pytest.raises(UserError, match="no token '<nope>'"):
        small.id("<nope>")


def described(small):
    return json.loads(small._backend.to_str())


def test_ids_of_added_tokens_stay_where_the_files_put_them(small, tmp_path):
    """Gaps, a list beside tokenizer.json, and the same through vocab.json, merges.txt and added_tokens.json."""
    values = described(small)
    values["added_tokens"][-1]["id"] = 1073  # <|11|>
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    row = {"content": "<new>", "special": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"1100": row}}))
    read = Tokenizer.from_folder(tmp_path)
    assert read.encode("x<|11|><new><|10|>") == [*small.encode("x"), 1073, 1100, small.id("<|10|>")]
    assert read.vocab_size == 1101 and read.decode([1100, 1073]) == "<new><|11|>"
    known = read.known_ids(1200)
    assert known.sum() == 601 and known[1100] and not known[1099] and not known[599]
    assert not set(read.encode_ordinary("<new><|11|><|10|>")) & set(read.added_tokens.values())
    assert pickle.loads(pickle.dumps(read)).encode("<new>") == [1100]
    read.save(tmp_path / "again.json")
    assert Tokenizer.from_file(tmp_path / "again.json").added_tokens == read.added_tokens
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(values["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(merge) for merge in values["model"]["merges"]))
    (tmp_path / "added_tokens.json").write_text(json.dumps({r["content"]: r["id"] for r in values["added_tokens"]}))
    slow = Tokenizer.from_folder(tmp_path)
    assert slow.added_tokens == read.added_tokens and slow.encode(SOURCES[0]) == read.encode(SOURCES[0])


@pytest.mark.parametrize("name, text, line", [
    ("tokenizer_config.json", "[]", "tokenizer_config.json: expected a JSON object"),
    ("tokenizer_config.json", "{", "tokenizer_config.json: is not valid JSON"),
    ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "an object|one as its added_tokens_decoder"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "tokenizer_config.json: lists an"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"900": {}}}', "without its id or content"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"900": "a"}}', "without its id or content"),
    ("added_tokens.json", '{"<x>": null}', "added_tokens.json: lists an added token without its id"),
    ("added_tokens.json", '{"<x>": 3}', "added token '<x>' has id 3, which does not fit"),
    ("added_tokens.json", '{"<x>": 1.5}', "added_tokens.json: lists an added token without its id or content: '<x>' as"),
    ("added_tokens.json", '{"<x>": 1e99}', "without its id or content"),
    ("added_tokens.json", '{"<x>": -1}', "without its id or content"),
    ("added_tokens.json", '{"": 900}', "without its id or content"),
    ("added_tokens.json", '{"<|11|>": 900}', "'<|11|>' has id 599 in tokenizer.json and 900 in a file beside it"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"9": {"content": "<x>"}, "900": {"content": "<x>"}}}',
     "tokenizer_config.json: gives '<x>' the ids 9 and 900"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"900": {"content": 5}}}', "without its id or content"),
    ("added_tokens.json", "[" * 100_000, "added_tokens.json: is not valid JSON"),
    ("vocab.json", "[]", "vocab.json: expected a JSON object"),
    ("merges.txt", "a b c", "merges.txt: does not fit vocab.json"),
])  # fmt: skip
def test_files_beside_a_tokenizer_are_named_where_they_are_malformed(small, tmp_path, name, text, line):
    values = described(small)
    if name in ("vocab.json", "merges.txt"):
        (tmp_path / "vocab.json").write_text(json.dumps(values["model"]["vocab"]))
        (tmp_path / "merges.txt").write_text("")
    else:
        small.save(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=line) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_stored_truncation_and_padding_are_off(small, tmp_path):
    values = described(small)
    values["truncation"] = {"direction": "Right", "max_length": 17, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                         "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    read, text = Tokenizer.from_folder(tmp_path), SOURCES[0][:200]
    assert len(small.encode(text)) > 17 and read.encode(text) == small.encode(text)
    assert read.encode_ordinary("a") == small.encode_ordinary("a")
    assert read.encode_batch([text, "a"]) == [small.encode(text), small.encode("a")]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=12))
def test_byte_fallback_is_streamed(text):
    """A vocabulary in SentencePiece's manner, whose decoder strips the first space."""
    import tokenizers

    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefgh", "</s>"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(
        {token: id_ for id_, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")])
    backend.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode(text)
    stream = IncrementalDecoder(tokenizer)
    assert "".join(stream.push(id_) for id_ in ids) + stream.finish() == tokenizer.decode(ids)
