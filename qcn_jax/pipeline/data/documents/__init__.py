"""What mid-training makes of a source's texts: forms of documents, registered or `package.module:OBJECT`.

A form is a function Request -> documents (see loader.Documents): a document is `tokens` int32 [T] and `weights`
float32 [T], of predicting the next token, and an index always gives the same one.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.pipeline.data.texts import Text
from qcn_jax.registry import Registry

if TYPE_CHECKING:
    from qcn_jax.pipeline.context import StageContext


@dataclasses.dataclass(frozen=True)
class Request:
    """What a form is asked for.

    Attributes:
      context: of stage `midtrain`, in the configuration of the phase.
      name: of the source.
      texts: to make documents of, with random access.
      tokenizer: the run's.
      length: tokens of a row; longer documents are split between rows.
      tokens: how many the phase will read.
      folder: for what the form keeps on disk, of this source and phase alone; not made yet.
    """

    context: "StageContext"
    name: str
    texts: Sequence[Text]
    tokenizer: Tokenizer
    length: int
    tokens: int
    folder: pathlib.Path


FORMS: Registry = Registry("form of documents", None, {
    "text": "qcn_jax.pipeline.data.documents.text:documents",
    "repository": "qcn_jax.pipeline.data.documents.repository:documents",
    "fim": "qcn_jax.pipeline.data.documents.fim:documents",
    "fim_sentinels": "qcn_jax.pipeline.data.documents.fim:sentinels",
    "fim_chat": "qcn_jax.pipeline.data.documents.fim:chats",
    "fim_edits": "qcn_jax.pipeline.data.documents.fim:edits",
    "pull_request": "qcn_jax.pipeline.data.documents.pull_request:documents",
    "pull_request_edits": "qcn_jax.pipeline.data.documents.pull_request:edits",
    "pull_request_diff": "qcn_jax.pipeline.data.documents.pull_request:diffs",
    "nano_edits": "qcn_jax.recipes.nano.edits:documents",
})
