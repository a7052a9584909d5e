"""Shows rows as a stage would train on them: tokens, segments, and which tokens the loss counts.

  qcn preview-data --config=finetune:MODEL_FOLDER --stage=sft --config.sft.data=chats.jsonl
  qcn preview-data --config=nano --stage=midtrain --workdir=runs/nano --rows=5 --html=rows.html

Counted tokens are green, on two shades in turn so that each can be told from the next; those with a weight other than
1 are yellow. Without colours (NO_COLOR is set, or the output is no terminal) counted ones stand in ⟦ and ⟧. Nothing is
written but FILE, and no device is used. Sources that are made of what a run's stages leave need that run's --workdir,
which is only read; its rows are then the ones of the run.
"""

import os
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from qcn_jax import config_checks, files
from qcn_jax.cli import parsing
from qcn_jax.config_phases import of_phase
from qcn_jax.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Parses flags, makes rows, and shows them on stdout and as a page."""
    values = flags.FlagValues()
    config = parsing.define_config(values, argv)
    flags.DEFINE_enum("stage", "sft", ["midtrain", "sft"], "Whose rows.", flag_values=values)
    flags.DEFINE_integer("rows", 3, "How many are shown.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("phase", 1, "Of mid-training, from 1.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("tokens", 600, "Tokens of a segment that are shown, half of them from its end; 0: all.",
                         flag_values=values, lower_bound=0)
    flags.DEFINE_string("html", None, "File for a page that shows the same.", flag_values=values)
    flags.DEFINE_string("workdir", None, "Folder of a run, to show what its stages have read; it is not written.",
                        flag_values=values)
    parsing.parse(values, "preview-data", __doc__, argv)
    settings = config()
    if values.html is not None and not pathlib.Path(values.html).absolute().parent.is_dir():
        raise UserError(f"--html={values.html}: there is no folder {pathlib.Path(values.html).absolute().parent}")
    of_phase(settings, values.stage, values.phase)
    config_checks.check(settings, [values.stage])
    from qcn_jax.pipeline import preview
    from qcn_jax.pipeline.data import loader
    from qcn_jax.pipeline.report import rows

    found = preview.preview(settings, values.stage, values.rows, values.phase, values.workdir)
    lines = [*found.notes, *loader.lines(found.packing)]
    if values.html is not None:
        title = f"{settings.name}: rows of stage {values.stage}"
        files.write_text(pathlib.Path(values.html), rows.to_page(found.rows, values.tokens, title, lines))
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # whatever the terminal cannot show
    for line in (*map(rows.visible, lines), "", *rows.to_terminal(found.rows, values.tokens, colour)):
        print(line)
    return 0
