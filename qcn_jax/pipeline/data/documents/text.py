"""A text as one document, tokenised when it is read: TEXT<|endoftext|>, its repeated blocks of lines masked."""

from collections.abc import Sequence

import numpy as np

from qcn_jax.chat.tokenizer import END_OF_TEXT, Tokenizer
from qcn_jax.pipeline.data.documents import Request
from qcn_jax.pipeline.data.documents.repetition import runs
from qcn_jax.pipeline.data.texts import Text


def documents(request: Request) -> "TextDocuments":
    """The form `text` of a source."""
    return TextDocuments(request.texts, request.tokenizer)


class TextDocuments:
    """Random access to texts as documents; what is spelt like an added token is text like any other."""

    def __init__(self, texts: Sequence[Text], tokenizer: Tokenizer) -> None:
        self._texts, self._tokenizer, self._end = texts, tokenizer, tokenizer.id(END_OF_TEXT)

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Document `index`: tokens int32 [T], weights float32 [T] of predicting the next token."""
        tokens: list[int] = []
        told: list[float] = []
        for part, repeated in runs(self._texts[index].text, set()):
            ids = self._tokenizer.encode_ordinary(part)
            tokens += ids
            told += [0.0 if repeated else 1.0] * len(ids)
        tokens.append(self._end)
        return {"tokens": np.asarray(tokens, np.int32), "weights": np.asarray([*told[1:], 1.0, 0.0], np.float32)}
