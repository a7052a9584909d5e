"""Converts weights between Hugging Face form (safetensors) and Orbax form; --from says which it is.

  qcn convert --from=HF_DIR --to=DIR      safetensors in, Orbax out
  qcn convert --from=DIR --to=HF_DIR      and back

Both forms hold config.json and, where the source has them, the tokenizer and the chat template as they are; every
verb and stage that takes a checkpoint reads either. A folder that holds anything but a model is not written to.
Values are kept bit for bit unless --dtype is given. Tensors of an encoder of images are copied, unless --vision=drop
makes it a model of text alone. The weights pass through the memory of this machine's devices, spread over all of them.
"""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from qcn_jax import files
from qcn_jax.cli import parsing
from qcn_jax.errors import UserError
from qcn_jax.hub import description


def main(argv: Sequence[str]) -> int:
    """Runs the conversion; returns 0."""
    values = flags.FlagValues()
    flags.DEFINE_string("from", None, "Folder to read: Hugging Face or Orbax form.", flag_values=values, required=True)
    flags.DEFINE_string("to", None, "Folder to write, in the other form; new, empty or an earlier model.",
                        flag_values=values, required=True)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Of all weights; as they are by default.",
                      flag_values=values)
    flags.DEFINE_enum("vision", "keep", ["keep", "drop"], "What becomes of an encoder of images beside the text model.",
                      flag_values=values)
    parsing.parse(values, "convert", __doc__, argv)
    source, target = pathlib.Path(values["from"].value), pathlib.Path(values["to"].value)
    read, written = source.resolve(), target.resolve()
    if read == written:
        raise UserError("--to: is the same folder as --from")
    if read in written.parents or written in read.parents:
        raise UserError(f"--to={target}: --from={source} and it lie within one another; name a folder beside it")
    if not files.is_dir(source):
        raise UserError(f"--from={source}: there is no such folder")
    linked = next((file for file in sorted(source.rglob("*")) if written in file.resolve().parents), None)
    if linked is not None:
        raise UserError(f"--to={target}: {linked} of --from is a link into it; name another folder")
    files.check_replaceable(target, description.surplus, "to")
    count, form = convert(source, target, values.dtype, values.vision == "keep")
    print(f"{target}: {count:,} parameters in {form} form")
    return 0


def convert(source: files.Path, target: files.Path, dtype: str | None = None, with_vision: bool = True
            ) -> tuple[int, str]:
    """Writes `source` to `target` in the other form; returns the text model's number of parameters and that form."""
    import jax

    from qcn_jax.hub import orbax_folder, reading, writing
    from qcn_jax.hub.layout import leaf_shapes

    config = reading.inspect(source)
    shardings = _spread(leaf_shapes(config))
    config, params = reading.load(source, dtype, shardings, progress=True)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    if orbax_folder.is_orbax(source):
        writing.save(target, config, params, progress=True, source=source, with_vision=with_vision)
        return count, "Hugging Face"
    orbax_folder.save(target, config, params, source=source, with_vision=with_vision)
    return count, "Orbax"


def _spread(shapes: dict[tuple[str, ...], tuple[int, ...]]) -> Any:
    """Shardings that split each array over all devices, along its longest axis that divides."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from qcn_jax.sharding import distributed

    mesh = Mesh(distributed.devices(), ("devices",))
    tree: dict[str, Any] = {}
    for path, shape in shapes.items():
        axes: list[str | None] = [None] * len(shape)
        divisible = [(size, axis) for axis, size in enumerate(shape) if size % math.prod(mesh.devices.shape) == 0]
        if divisible:
            axes[max(divisible)[1]] = "devices"
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = NamedSharding(mesh, PartitionSpec(*axes))
    return tree
