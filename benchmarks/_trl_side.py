"""The datasets and trl half of packing.py and readers.py; runs in an interpreter that has these packages, not ours.

    python _trl_side.py JOB.json RESULT.json

JOB: {"do": "pack", "folder", "length", "shuffled"}: an Arrow dataset of `input_ids`, in order or shuffled, packed by
trl.pack_dataset with its defaults; {"do": "stream", "path"}: every row of a JSONL file, one at a time; {"do": "store",
"path", "order"}: the file into datasets' own store, then rows of it at random.
"""

import json
import os
import pathlib
import sys
import tempfile
import time

os.environ |= {"HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import datasets  # noqa: E402
from _measure import Measured  # noqa: E402

datasets.disable_progress_bars()


def pack(job):
    from trl.data_utils import pack_dataset

    dataset = datasets.Dataset.from_file(f"{job['folder']}/documents.arrow")
    with Measured() as measured, tempfile.TemporaryDirectory(dir=job["folder"]) as cache:
        if job["shuffled"]:
            dataset = dataset.shuffle(seed=0, indices_cache_file_name=f"{cache}/indices.arrow")
        packed = pack_dataset(dataset, job["length"], "bfd_split",
                              {"cache_file_name": f"{cache}/packed.arrow", "load_from_cache_file": False})
        rows = len(packed)
    return measured.result | {"rows": rows}


def stream(job):
    with Measured() as measured:
        rows = datasets.load_dataset("json", data_files=job["path"], split="train", streaming=True)
        characters = sum(len(row["text"]) for row in rows)
    return measured.result | {"characters": characters}


def store(job):
    with tempfile.TemporaryDirectory(dir=pathlib.Path(job["path"]).parent) as cache:
        with Measured() as measured:
            rows = datasets.load_dataset("json", data_files=job["path"], split="train", cache_dir=cache)
            begun = time.process_time()
            characters = sum(len(rows[index]["text"]) for index in job["order"])
            reading = time.process_time() - begun
    return measured.result | {"characters": characters, "reading": reading}


if __name__ == "__main__":
    task = json.loads(pathlib.Path(sys.argv[1]).read_text())
    pathlib.Path(sys.argv[2]).write_text(json.dumps({"pack": pack, "stream": stream, "store": store}[task["do"]](task)))
