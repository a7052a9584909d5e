"""Edit documents: whole ones that fit into a row, or one line that says that none does."""

import pytest

from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.errors import UserError
from qcn_jax.pipeline.stages.midtrain import ADDED_TOKENS
from qcn_jax.recipes.nano import edits
from qcn_jax.recipes.nano.spans import LINE_TOKENS

CODE = "def smaller(a, b):\n    if a < b:\n        return a\n    return b\n"


def test_documents_longer_than_a_row_are_drawn_again_and_not_for_ever():
    table = edits.function_table([("short.py", CODE), ("long.py", CODE.replace("smaller", "s" * 200))], max_lines=9)
    tokenizer = Tokenizer.train([CODE], 256 + len(ADDED_TOKENS) + len(LINE_TOKENS), (*ADDED_TOKENS, *LINE_TOKENS))
    assert {function.path for function in table} == {"short.py", "long.py"}
    made = lambda tokens: edits.EditDocuments(table, tokenizer, seed=0, max_tokens=tokens)
    documents = made(120)
    assert all("short.py" in tokenizer.decode(documents[i]["tokens"]) for i in range(20))
    with pytest.raises(UserError, match="none of 1000 functions with its edits has at most 20 tokens"):
        made(20)[0]
