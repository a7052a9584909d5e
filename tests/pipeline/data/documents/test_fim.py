"""Fill in the middle: what is cut can be put together again, in every form."""

import types

import numpy as np
import pytest

from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data.documents import FORMS, fim
from qcn_jax.pipeline.data.texts import Text

ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
TEXT = "".join(f"def function_{i}(value):\n    return value + {i}\n\n\n" for i in range(12))


@pytest.fixture(name="tokenizer", scope="module")
def _tokenizer():
    return Tokenizer.train([TEXT], 256 + 40 + len(ADDED), ADDED)


def test_cuts_cover_the_text_and_differ():
    rng = np.random.default_rng(0)
    spans = [fim.cut(TEXT, rng) for _ in range(200)]
    assert all(span.prefix + span.middle + span.suffix == TEXT and span.middle for span in spans)
    at_lines = [span for span in spans if span.middle.endswith("\n") and span.prefix[-1:] in ("", "\n")]
    assert 60 < len(at_lines) < 160 and len({span.middle for span in spans}) > 100
    assert fim.cut("ab", rng).middle
    with pytest.raises(UserError, match="two characters"):
        fim.cut("a", rng)


def test_sentinel_form(tokenizer):
    span = fim.Span("def f(x):\n", "    return x\n", "\n\nprint(f(1))\n")
    document = fim.sentinel(span, tokenizer)
    assert tokenizer.decode(document["tokens"]) == (
        "<|fim_prefix|>def f(x):\n<|fim_suffix|>\n\nprint(f(1))\n<|fim_middle|>    return x\n<|endoftext|>")
    assert document["weights"][:-1].all() and document["weights"][-1] == 0


def test_an_edit_restores_the_text(tokenizer):
    rng = np.random.default_rng(1)
    for _ in range(30):
        span = fim.cut(TEXT, rng)
        document = fim.edit(span, "a/b.py", tokenizer)
        prompt, answer = tokenizer.decode(document["tokens"]).split("<|im_start|>assistant\n")
        shown = prompt.removesuffix("<|im_end|>\n").split("a/b.py\n", 1)[1]
        search, replace = answer.removeprefix("<|fim_prefix|>").removesuffix("<|im_end|>").split("<|fim_suffix|>")
        assert shown.count(search) == 1 and search.count("<|fim_middle|>") == 1
        assert shown.replace(search, replace) == TEXT
        counted = tokenizer.decode(document["tokens"][1:][document["weights"][:-1] > 0])
        assert counted == answer


def test_chat_form_has_the_sentinels_in_turns(tokenizer):
    span = fim.Span("Notes on ", "filling", " in.\n")
    document = fim.chat(span, "", tokenizer)
    assert tokenizer.decode(document["tokens"]) == (
        "<|im_start|>system\nYou are a code completion assistant.<|im_end|>\n<|im_start|>user\n<|fim_prefix|>Notes on "
        "<|fim_suffix|> in.\n<|fim_middle|><|im_end|>\n<|im_start|>assistant\nfilling<|im_end|>")
    assert tokenizer.decode(document["tokens"][1:][document["weights"][:-1] > 0]) == "filling<|im_end|>"


def test_a_source_names_one_form_or_a_mixture(tokenizer):
    texts = [Text(TEXT, "a.py"), Text("Prose that is no code, " * 20)]
    request = lambda: types.SimpleNamespace(texts=texts, tokenizer=tokenizer, length=200, context=types.SimpleNamespace(
        config=types.SimpleNamespace(seed=3)))
    begins = {name: {tokenizer.decode(FORMS.resolve(name)(request())[i]["tokens"])[:16] for i in range(12)}
              for name in ("fim_sentinels", "fim_chat", "fim_edits", "fim")}
    assert {start[:14] for start in begins["fim_sentinels"]} == {"<|fim_prefix|>"}
    assert begins["fim_chat"] == {"<|im_start|>syst"} and begins["fim_edits"] == {"<|im_start|>user"}
    assert {start[:7] for start in begins["fim"]} == {"<|fim_p", "<|im_st"} and "<|im_start|>syst" not in begins["fim"]


def test_documents_are_a_function_of_their_index_and_fit(tokenizer):
    texts = [Text(TEXT, "a.py"), Text("x = 1\ny = 2\n", "b.py"), Text("", "empty.py")]
    make = lambda: fim.FimDocuments(texts, tokenizer, seed=5, max_tokens=200)
    first, again = make(), make()
    documents = [first[i] for i in range(40)]
    for i in (39, 3, 17):
        assert np.array_equal(again[i]["tokens"], documents[i]["tokens"])
    assert all(len(document["tokens"]) <= 200 for document in documents)
    assert len({document["tokens"].tobytes() for document in documents}) > 30
    chat = sum(document["tokens"][0] == tokenizer.id("<|im_start|>") for document in documents)
    assert 8 < chat < 32
    with pytest.raises(UserError, match="no text"):
        fim.FimDocuments([Text("", "a")], tokenizer, seed=0, max_tokens=100)
    with pytest.raises(UserError, match="hold no document"):
        fim.FimDocuments(texts, tokenizer, seed=0, max_tokens=4)[0]
