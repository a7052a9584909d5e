"""The web expert on a small machine: pages in a real Chromium, defects in HTML, style sheets and scripts, a report.

    STAGES=tasks,midtrain,sft,experts,evaluate,report
    qcn run --config=configs/experts_small.py --workdir=runs/experts_small --stages=$STAGES
    qcn run --config=configs/experts_small.py:react --workdir=runs/experts_react --stages=$STAGES
    qcn run --config=configs/experts_small.py:quick --workdir=runs/quick --stages=$STAGES

Needs `pip install 'qcn_jax[web]'` and, for local sandboxes, `apt-get install chromium libatomic1`; without them stage
`tasks` says so and the expert is skipped. Held-out tasks are of templates that training never shows. The model is
nano's; the packaged base has seen no page. With `react` a third of the templates are of React, built by Vite; `quick`
shows that everything works.
"""

import dataclasses
import pathlib
import runpy

from qcn_jax.config import (
    ChatSource,
    RunConfig,
    SftConfig,
    TasksConfig,
    TextSource,
    WebConfig,
    from_config_dict,
    to_config_dict,
)
from qcn_jax.errors import UserError

TRAIN, HELDOUT = ("basket", "booking", "checklist", "filter", "questions"), ("dialog", "pager", "tabs")
REACT_TRAIN, REACT_HELDOUT = ("poll", "quiz", "seats"), ("roster",)
LENGTH = 1152  # tokens of the longest episode: a whole style sheet is some 600


def get_config(pace=""):
    """Nano's model on pages; `pace` is empty, react or quick."""
    if pace not in ("", "react", "quick"):
        raise UserError(f"--config=configs/experts_small.py:{pace}: unknown; allowed: react, quick, or nothing behind "
                        "the file's name")
    quick, react = pace == "quick", pace == "react"
    nano = from_config_dict(RunConfig, runpy.run_path(str(pathlib.Path(__file__).with_name("nano.py")))["get_config"]())
    model = dataclasses.replace(nano.model, max_position_embeddings=LENGTH)
    rollout = dataclasses.replace(nano.experts.rollout, max_length=LENGTH, max_turns=6, slots=24 if quick else 64)
    pages = lambda names, seeds: tuple(f"pages:{name}:{seed}" for seed in seeds for name in names)
    train = dataclasses.replace(nano.sft.train, steps=10 if quick else 240, rows=3, sequence_length=LENGTH)
    return to_config_dict(dataclasses.replace(
        nano, name={"": "experts_small", "react": "experts_react", "quick": "experts_quick"}[pace], model=model,
        tasks=TasksConfig(
            repos_train=pages(TRAIN[:1] if quick else TRAIN + REACT_TRAIN * react, (1,) if quick else (1, 2, 3)),
            repos_heldout=pages(HELDOUT[2:] if quick else HELDOUT + REACT_HELDOUT * react, (1,)),
            train=6 if quick else 150, heldout=3 if quick else 60, candidates_per_repo=8 if quick else 60,
            single_line=True, max_function_lines=64, hide_tests=False, reruns=0),
        midtrain=dataclasses.replace(
            nano.midtrain, train=dataclasses.replace(nano.midtrain.train, steps=5 if quick else 300, rows=3,
                                                     sequence_length=LENGTH),
            sources={"pages": TextSource(kind="nano", form="nano_edits", megabytes=0.001)}),  # no Python beside them
        sft=SftConfig(train=train, sources={"nano": ChatSource(kind="nano", options={
            "per_task": 1 if quick else 2, "recovery": 0.4})}),
        experts=dataclasses.replace(
            nano.experts, names=("web",), updates=1 if quick else 6, prompts=2 if quick else 8,
            group_size=4 if quick else 8, rows=3, sequence_length=LENGTH, rollout=rollout),
        web=WebConfig(samples=2 if quick else 4, steps=2 if quick else 40),
        distill=dataclasses.replace(nano.distill, rows=3, sequence_length=LENGTH, rollout=rollout),
        evaluate=dataclasses.replace(nano.evaluate, tasks=3 if quick else 60, pass_k_tasks=0, sft_control=False,
                                     rollout=rollout)))
