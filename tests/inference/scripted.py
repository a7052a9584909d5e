"""An engine that writes a given text, for what answers are made of, and a tokenizer whose ids are characters."""

import threading

import numpy as np

from qcn_jax.inference.generation import Generation

STOP = 0
VIEW = [{"type": "function", "function": {"name": "view", "parameters": {"properties": {"path": {"type": "array"}}}}}]


class Speller:
    """A tokenizer whose ids are characters."""

    vocab_size = 0x110000

    def token_bytes(self, id_: int) -> bytes:
        return chr(id_).encode()

    def encode(self, text: str) -> list[int]:
        return list(map(ord, text))

    encode_ordinary = encode

    def decode(self, ids) -> str:
        return "".join(map(chr, ids))


class Scripted:
    """Continues every prompt with `text` and a stop, or for ever; fails at prompts that hold `poison`."""

    slots, parts, snapshots, max_length, with_routes = 3, 1, 0, 4096, False

    def __init__(self, text: str = "", poison: str | None = None, endless: bool = False) -> None:
        self.text, self.poison, self.endless = text, poison, endless
        self.held: dict[int, list[int]] = {}
        self.prompts: dict[int, int] = {}
        self.running = threading.Event()  # something was generated

    def clear(self) -> None:
        self.held = {}

    def reset(self, slots) -> None:
        self.held.update((slot, []) for slot in slots)

    def extend(self, tokens) -> None:
        for slot, ids in tokens.items():
            self.held[slot] = self.held.get(slot, []) + list(ids)

    def fork(self, copies) -> None:
        self.held.update((target, list(self.held[source])) for source, targets in copies.items() for target in targets)

    def restore(self, entries) -> None:
        assert not entries  # nothing was saved

    def length(self, slot: int) -> int:
        return len(self.held[slot])

    def part(self, slot: int) -> int:
        return 0

    def fitting(self, slots, new: int) -> list[int]:
        return list(slots)

    def has_room(self, lengths, new: int) -> bool:
        return True

    def counts(self) -> dict[str, int]:
        return {}

    def generate(self, slots, *, seeds, sampling, max_new_tokens, histories=None):
        self.running.set()
        if self.poison and any(ord(self.poison) in self.held[slot] for slot in slots):
            self.held = {slot: [7] for slot in self.held}  # as a device that lost its memory
            raise RuntimeError("out of memory")
        return [self._one(slot, most) for slot, most in zip(slots, max_new_tokens, strict=True)]

    def _one(self, slot: int, most: int) -> Generation:
        held = self.held[slot]
        begun = held.index(ord("$")) + 1  # prompts end with it
        rest = [ord("x")] * most if self.endless else [*map(ord, self.text), STOP][len(held) - begun :][:most]
        held += rest
        zeros = np.zeros(len(rest), np.float32)
        return Generation(rest, zeros, zeros, "stop" if rest[-1] == STOP else "paused")
