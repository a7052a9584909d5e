"""Edits as conversations: the right edit restores the true text, refuted ones are read and not learned."""

import numpy as np
import pytest

from qcn_jax.envs.scaffolds import MAX_LINE_TOKENS, NANO, line_token
from qcn_jax.hub.tokenizer import Tokenizer
from qcn_jax.pipeline.data.agent_edits import AgentEditDocuments
from qcn_jax.pipeline.data.chat import ChatEncoder
from qcn_jax.pipeline.data.edits import EditDocuments, function_table

SOURCE = '''
def clamp(value, low, high):
    if value < low and low is not None:
        return low
    if value > high or not high:
        return high + 1
    return True


def find(items, wanted):
    for index, item in enumerate(items):
        if item == wanted:
            return index
    return -1
'''
ADDED = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|file_sep|>", "<|fim_middle|>", "<|fim_suffix|>", "<tool_call>",
    "</tool_call>", "<tool_response>", "</tool_response>", "<function=", "</function>", "<parameter=", "</parameter>",
    *(line_token(n + 1) for n in range(MAX_LINE_TOKENS)),
)  # fmt: skip


@pytest.fixture(name="documents", scope="module")
def _documents():
    tokenizer = Tokenizer.train([SOURCE], 256 + 60 + len(ADDED), ADDED)
    table = function_table([("a/b.py", SOURCE)], max_lines=20)
    make = lambda seed: AgentEditDocuments(EditDocuments(table, tokenizer, seed=0, max_tokens=1000),
                                           ChatEncoder(tokenizer), seed=seed, max_tokens=1000)
    return tokenizer, make


def test_documents_hold_one_right_edit_and_learn_nothing_refuted(documents):
    tokenizer, make = documents
    truths = {"\n".join(part.split("\n")[:6]).strip() for part in SOURCE.strip().split("\n\n\n")}
    attempts = []
    for index in range(60):
        document = make(3)[index]
        text = tokenizer.decode(document["tokens"])
        learned = tokenizer.decode(document["tokens"][1:][document["weights"][:-1] > 0])
        turns = [part.split("<|im_end|>")[0] for part in text.split("<|im_start|>assistant\n")[1:]]
        calls = [NANO.parse(turn).calls for turn in turns]
        edits = [call.arguments for turn in calls for call in turn if call.name == "edit"]
        shown = text.split("a/b.py\n")[1].split("<|im_end|>")[0].split("\n</tool_response>")[0].split("\n")
        lines = [line.removeprefix(line_token(n)) for n, line in enumerate(shown, 1)]
        fixed = [line.replace(edits[-1]["old"], edits[-1]["new"], 1) if line_token(n) == edits[-1]["line"] else line
                 for n, line in enumerate(lines, 1)]
        assert any("\n".join(fixed[:5]) in truth for truth in truths) and fixed != lines
        # What is learned: every turn but those behind which FAILED stands.
        assert learned.count("<function=edit>") == 1
        assert text.count("FAILED") == len(edits) - 1 == text.count("<function=undo>")
        assert len({tuple(edit.items()) for edit in edits}) == len(edits)
        attempts.append(len(edits))
    assert set(attempts) == {1, 2, 3, 4}


def test_documents_are_a_function_of_their_index_and_seed(documents):
    _, make = documents
    first, again, other = make(3), make(3), make(4)
    assert all(np.array_equal(first[i]["tokens"], again[i]["tokens"]) for i in (7, 0, 3))
    assert any(not np.array_equal(first[i]["tokens"], other[i]["tokens"]) for i in range(4))
