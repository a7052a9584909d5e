"""Flags of verbs that build an engine: how many sequences decode at a time, and what all share of keys and values."""

from absl import flags

NAMES = "max_num_seqs", "block_size", "num_blocks"


def define(values: flags.FlagValues, slots: str) -> None:
    """Defines --max_num_seqs, --block_size and --num_blocks; `slots`: the flag for how many sequences there are."""
    flags.DEFINE_integer("max_num_seqs", None, f"Of --{slots}, how many generate at a time; the others keep what they "
                         "hold. By default all.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("block_size", None, "Tokens of a block of keys and values, so that a sequence costs what it "
                         "holds. By default --max_length.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("num_blocks", None, f"Blocks that all of --{slots} share; what was used longest ago makes "
                         "room, in host memory. By default what all can fill.", flag_values=values, lower_bound=1)


def given(values: flags.FlagValues) -> dict[str, int]:
    """Those that were given, by name."""
    return {name: values[name].value for name in NAMES if values[name].value is not None}
