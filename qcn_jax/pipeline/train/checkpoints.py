"""Checkpoints of a training loop: state, data position and small extras, through Orbax.

A checkpoint appears under its step's name only when it is complete (written to a temporary folder, then renamed), so
that a kill at any moment leaves the previous one; leftovers are removed at the next start. What lies on a disk may be
damaged later: checksums are compared before a checkpoint is restored, and a damaged one is moved aside for the one
before it.
"""

import logging
import pathlib
import threading
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from qcn_jax.errors import UserError
from qcn_jax.pipeline.train import checksums
from qcn_jax.sharding import distributed

DAMAGED = "damaged_checkpoints"  # beside the folder of checkpoints

# Orbax reports every file it writes at this level; a run has one progress line.
logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints of one loop, in `directory`, of which the latest `keep` stay."""

    def __init__(self, directory: pathlib.Path, keep: int = 2) -> None:
        """Opens (and makes) the folder.

        Raises:
          UserError: the folder cannot be made or read.
        """
        self._directory = pathlib.Path(directory).absolute()
        self._keep = keep
        self._sealing: threading.Thread | None = None
        self._unsealed: Exception | None = None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self._directory, options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True))
        except OSError as error:
            raise UserError(f"{directory}: cannot be made or read: {error.strerror}") from error

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: grain.DatasetIterator | None = None,
             extra: dict[str, Any] | None = None, wait: bool = False) -> None:
        """Saves in the background (the arrays are copied before this returns, so they may be donated).

        Args:
          step: its name; a step that exists already is left alone.
          state: pytree of arrays.
          data: Grain iterator whose position is saved, per process.
          extra: further JSON values.
          wait: return only when it is on disk.
        Raises:
          UserError: the disk is full or cannot be written (of this or of the previous save).
        """
        if step == self.latest:
            return
        items = {"state": ocp.args.StandardSave(state), "extra": ocp.args.JsonSave(extra or {})}
        if data is not None:
            items["data"] = grain.checkpoint.CheckpointSave(data)
        self._wait_for_seal()  # a later save may remove what is being summed
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
            self._sealing = threading.Thread(target=self._seal, args=(step,), daemon=True)
            self._sealing.start()
            if wait:
                self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unwritable(error) from error
        if wait:
            self._wait_for_seal()

    def _seal(self, step: int) -> None:
        """Writes the checksums of a checkpoint once it is complete."""
        try:
            self._manager.wait_until_finished()
        except Exception:
            return  # the thread that saves hears of it too
        try:
            checksums.write(self._directory / str(step), jax.process_index(), jax.process_count())
        except (OSError, UserError) as error:
            self._unsealed = error

    def _wait_for_seal(self) -> None:
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None
        if self._unsealed is not None:
            error, self._unsealed = self._unsealed, None
            raise self._unwritable(error) from error

    def newest(self) -> int | None:
        """Step of the newest checkpoint that is not damaged; None where there is none."""
        good = (step for step in sorted(self._manager.all_steps(), reverse=True) if self._damage(step) is None)
        return next(good, None)

    def _damage(self, step: int) -> str | None:
        return _agreed(checksums.damage(self._directory / str(step), jax.process_index(), jax.process_count()))

    def restore(self, state: Any, data: grain.DatasetIterator | None = None,
                log: Callable[[str], None] = lambda line: None, data_after: int = 0
                ) -> tuple[int, Any, dict[str, Any]] | None:
        """Restores the newest checkpoint that is not damaged; damaged ones are moved aside, and said.

        Args:
          state: pytree of arrays or ShapeDtypeStructs with the shapes, types and shardings to restore into;
            a checkpoint from another mesh is laid out anew. Arrays are freed where there is a checkpoint, so that
            a device never holds two states.
          data: Grain iterator to move to the saved position.
          log: takes one line about each checkpoint that is not used or not checked.
          data_after: `data` is left at its beginning where the checkpoint is not of a later step.
        Returns:
          (step, state, extra), or None where there is no checkpoint.
        Raises:
          UserError: every checkpoint is damaged; the newest good one does not fit `state` (another model or
            optimizer), or another number of processes saved data positions of their own.
        """
        damaged: dict[int, str] = {}
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder = self._directory / str(step)
            words = self._damage(step)
            if words is None:
                checked = checksums.are_complete(folder)
                try:
                    restored = self._restore_one(step, abstract, state, data if step > data_after else None)
                except UserError:
                    raise
                except Exception as error:  # whatever Orbax, TensorStore and Grain raise over what they find
                    words = " ".join(str(error).split())[:200]
                    if checked:
                        raise UserError(f"{folder}: cannot be restored: {words}") from error
                else:
                    if not checked:
                        log(f"checkpoint {step} has no checksums (it was the last before a kill); restored unchecked")
                    self._set_aside(damaged, step, log)
                    return step, restored["state"], restored["extra"]
            damaged[step] = words
        if damaged:
            raise UserError(self._all_damaged(damaged))
        return None

    def _restore_one(self, step: int, abstract: Any, state: Any, data: grain.DatasetIterator | None) -> Any:
        if data is not None:
            self._require_processes(step)
        self._require_same(step, abstract)
        for leaf in jax.tree.leaves(state):
            if isinstance(leaf, jax.Array):
                leaf.delete()
        items = {"state": ocp.args.StandardRestore(abstract), "extra": ocp.args.JsonRestore()}
        if data is not None:
            items["data"] = grain.checkpoint.CheckpointRestore(data)
        return self._manager.restore(step, args=ocp.args.Composite(**items))

    def _set_aside(self, damaged: dict[int, str], used: int, log: Callable[[str], None]) -> None:
        """Moves damaged checkpoints out of the way of those that will be saved under the same steps."""
        if not damaged:
            return
        aside = self._directory.with_name(DAMAGED)
        with distributed.first_before_others("damaged checkpoints"):
            if distributed.is_first():
                aside.mkdir(exist_ok=True)
                for step in damaged:
                    names = (str(step), *(f"{step}-{number}" for number in range(2, 1000)))
                    (self._directory / str(step)).rename(next(aside / n for n in names if not (aside / n).exists()))
        for step, words in damaged.items():
            log(f"checkpoint {step} is damaged and lies in {aside} now ({words}); that of step {used} is used")
        self._manager.reload()

    def _all_damaged(self, damaged: dict[int, str]) -> str:
        step, words = next(iter(damaged.items()))
        others = f", and so are the {len(damaged) - 1} before it" if len(damaged) > 1 else ", and none is before it"
        more = "" if self._keep > 1 else "; keep=2 would keep one more"
        return (f"{self._directory / str(step)}: is damaged{others} ({words}); delete {self._directory} to train from "
                f"the beginning, or a checkpoint's checksums.*.json to use it unchecked{more}")

    def _require_same(self, step: int, abstract: Any) -> None:
        """Compares names and shapes, so that another model is not taken for damage."""
        with ocp.StandardCheckpointer() as checkpointer:
            stored = _shapes(checkpointer.metadata(self._directory / str(step) / "state").item_metadata.tree)
        wanted = _shapes(abstract)
        for name in sorted(stored.keys() | wanted.keys()):
            if stored.get(name) != wanted.get(name):
                has, needs = (f"shape {list(found[name])}" if name in found else "none" for found in (stored, wanted))
                raise UserError(f"{self._directory / str(step)}: does not fit this model and optimizer: of {name} it "
                                f"has {has}, and {needs} is needed; restore the configuration, or delete the folder")

    def _require_processes(self, step: int) -> None:
        """Every process has its own position in its own documents; no other number of them can take these up."""
        saved = len(list((self._directory / str(step) / "data").glob("process_*-of-*.json")))
        if saved and saved != jax.process_count():
            raise UserError(f"{self._directory / str(step)}: {saved} processes saved it, each with its position in the "
                            f"data, and {jax.process_count()} would go on; start as many (their devices may differ)")

    def close(self) -> None:
        """Waits for saves under way and releases threads.

        Raises:
          UserError: a save in the background failed.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.close()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unwritable(error) from error
        finally:
            self._wait_for_seal()

    def _unwritable(self, error: Exception) -> UserError:
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0][:200]
        return UserError(f"{self._directory}: checkpoint cannot be written: {reason}")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every array by its path; containers of whatever kind are told apart by their keys alone."""
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): tuple(leaf.shape)
            for keys, leaf in jax.tree_util.tree_leaves_with_path(tree) if hasattr(leaf, "shape")}


def _agreed(words: str | None) -> str | None:
    """The same verdict in every process: what any has found wrong is wrong for all."""
    if distributed.alone():
        return words
    found = multihost_utils.process_allgather(np.int32(words is not None))
    return words or ("another process says what" if np.any(found) else None)
