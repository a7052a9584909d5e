"""Where texts and conversations are read: kinds of sources, registered or `package.module:OBJECT`."""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qcn_jax.pipeline.data.texts import Findings, Text
from qcn_jax.registry import Registry

if TYPE_CHECKING:
    from qcn_jax.config import ChatSource, RunConfig, TextSource
    from qcn_jax.pipeline.context import StageContext


class TextReader(abc.ABC):
    """Reads the texts of a source of `config.midtrain.sources`."""

    @abc.abstractmethod
    def check(self, config: "RunConfig", source: "TextSource", field: str) -> None:
        """Raises UserError, which begins with `field`, where the source cannot be read; asked before any work."""

    @abc.abstractmethod
    def read(self, context: "StageContext", source: "TextSource", findings: Findings) -> Iterator[Text]:
        """Yields texts, the same in the same order for the same configuration, in bounded memory.

        Args:
          context: of stage `midtrain`.
          source: its settings; at most `megabytes` of text are read where that is above 0.
          findings: is told of rows that are malformed and of texts that are left out.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation to imitate.

    Attributes:
      messages: as chat.encoder.ChatEncoder takes them; an assistant's `weight` is that of its tokens in the loss.
      tools: schemas that the system turn lists; None where it lists none.
      place: where it was read.
      labels: what it is counted as.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: list[dict[str, Any]] | None = None
    place: str = ""
    labels: tuple[str, ...] = ()


class ChatReader(abc.ABC):
    """Reads the conversations of a source of `config.sft.sources`."""

    sandbox = False  # whether it executes code

    @abc.abstractmethod
    def check(self, config: "RunConfig", source: "ChatSource", field: str) -> None:
        """Raises UserError, which begins with `field`, where the source cannot be read; asked before any work."""

    @abc.abstractmethod
    def read(self, context: "StageContext", source: "ChatSource", findings: Findings, stopped: Callable[[], bool]
             ) -> Iterator[Conversation]:
        """Yields conversations, the same in the same order for the same configuration.

        Args:
          context: of stage `sft`.
          source: its settings.
          findings: is told of rows that are malformed and of conversations that are left out.
          stopped: asked now and then; True ends the reading.
        """


READERS = Registry("reader of texts", TextReader, {
    "files": "qcn_jax.pipeline.data.readers.files:FILES",
    "pull_requests": "qcn_jax.pipeline.data.readers.pull_requests:PULL_REQUESTS",
    "nano": "qcn_jax.recipes.nano.corpus:CORPUS",
})
CHATS = Registry("reader of conversations", ChatReader, {
    "chat": "qcn_jax.pipeline.data.readers.chat:CHAT",
    "nano": "qcn_jax.recipes.nano.trajectories:SCRIPTED",
})
