"""Checkpoints of a training loop: state, data position and small extras, through Orbax.

A checkpoint appears under its step's name only when it is complete (written to a temporary folder, then
renamed), so that a kill at any moment leaves the previous one; leftovers are removed at the next start.
"""

import logging
import pathlib
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from qcn_jax.errors import UserError

# Orbax reports every file it writes at this level; a run has one progress line.
logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints of one loop, in `directory`, of which the latest `keep` stay."""

    def __init__(self, directory: pathlib.Path, keep: int = 2) -> None:
        """Opens (and makes) the folder.

        Raises:
          UserError: the folder cannot be made.
        """
        self._directory = pathlib.Path(directory).absolute()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{directory}: cannot be made: {error.strerror}") from error
        self._manager = ocp.CheckpointManager(
            self._directory, options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True))

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
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
            if wait:
                self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unwritable(error) from error

    def restore(self, state: Any, data: grain.DatasetIterator | None = None
                ) -> tuple[int, Any, dict[str, Any]] | None:
        """Restores the newest checkpoint.

        Args:
          state: pytree of arrays or ShapeDtypeStructs with the shapes, types and shardings to restore into;
            a checkpoint from another mesh is laid out anew. Arrays are freed where there is a checkpoint, so that
            a device never holds two states.
          data: Grain iterator to move to the saved position.
        Returns:
          (step, state, extra), or None where there is no checkpoint.
        Raises:
          UserError: the checkpoint does not fit `state` (another model or optimizer), or another number of
            processes saved data positions of their own.
        """
        step = self.latest
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        if data is not None:
            self._require_processes(step)
        for leaf in jax.tree.leaves(state):
            if isinstance(leaf, jax.Array):
                leaf.delete()
        items = {"state": ocp.args.StandardRestore(abstract), "extra": ocp.args.JsonRestore()}
        if data is not None:
            items["data"] = grain.checkpoint.CheckpointRestore(data)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(f"{self._directory / str(step)}: does not fit this model and optimizer; delete the "
                            f"folder or restore the configuration ({str(error).splitlines()[0][:200]})") from error
        return step, restored["state"], restored["extra"]

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

    def _unwritable(self, error: Exception) -> UserError:
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0][:200]
        return UserError(f"{self._directory}: checkpoint cannot be written: {reason}")
