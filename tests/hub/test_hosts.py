"""Two processes of four devices each load their shards of one checkpoint and write another one together."""

import dataclasses
import json
import os
import pathlib
import resource
import sys

import jax
import numpy as np
import pytest

from qcn_jax import files, hub, testing
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.config import MeshConfig
from qcn_jax.errors import UserError
from qcn_jax.hub import description, stored, writing
from qcn_jax.pipeline.train.layout import param_shardings
from qcn_jax.sharding import distributed
from qcn_jax.sharding.mesh import make_parallel
from tests.hub.models import TINY, equal, random_params

pytestmark = pytest.mark.slow

CONFIG = dataclasses.replace(TINY, vocab_size=320, num_experts=8, moe_intermediate_size=32, num_nextn_predict_layers=1)
# Experts on hosts of their own, and two axes at work; every tensor spread over both hosts; all of them on all devices.
MESHES = {"expert": MeshConfig(fsdp=1, expert=4, tensor=2), "fsdp": MeshConfig(fsdp=8),
          "data": MeshConfig(fsdp=1, data=8)}
SLAB = 9_000  # bytes: less than an expert, so that rows of tensors are cut


class Counter:
    """Bytes that go through a function of (..., data) or that gives an array."""

    def __init__(self, function):
        self.function, self.bytes = function, 0

    def __call__(self, *arguments):
        result = self.function(*arguments)
        self.bytes += result if isinstance(result, int) else result.nbytes
        return result

    def __get__(self, instance, owner):
        return lambda *arguments: self(instance, *arguments)


def run(coordinator, process, folder):
    """What each process does; what it has seen goes to <process>.json."""
    assert distributed.start(coordinator, 2, process)
    folder, seen = pathlib.Path(folder), {}
    writing.GATHERED_BYTES = SLAB
    tokenizer = Tokenizer.from_folder(folder / "saved")
    for name, mesh in MESHES.items():
        shardings = param_shardings(CONFIG, make_parallel(mesh))
        stored.Source.rows = read = Counter(stored.Source.__dict__["rows"])
        config, params = hub.load(folder / "saved", shardings=shardings)
        stored.Source.rows = read.function
        assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, params, shardings))
        held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
        os.pwrite = wrote = Counter(os.pwrite)
        hub.save(folder / name, config, params, tokenizer)
        os.pwrite = wrote.function
        seen[name] = {"read": read.bytes, "held": held, "wrote": wrote.bytes}
        assert (folder / name / "config.json").is_file()  # for every process, as soon as save has returned
    seen["full disk"] = refused(lambda: hub.save(folder / "full", config, params), process == 1)
    seen["other things"] = refused(lambda: hub.save(folder, config, params))
    seen["in turn"] = refused(lambda: in_turn(folder, process == 0))
    seen["nested"] = refused(lambda: in_turn(folder, False, lambda: hub.save(folder / "nested", config, params)))
    alone, = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(hub.load(folder / "saved")[1])
              if path[0].key == "norm"]
    assert alone.is_fully_addressable
    files.write_json(folder / f"{process}.json", seen)


def in_turn(folder, fails, inside=lambda: None):
    """A block that the first process enters before the other."""
    with distributed.first_before_others("test"):
        if fails:
            raise UserError("what the first one says")
        inside()


def refused(save, limited=False):
    """The line with which `save` is refused; `limited`: this process may write no file of more than a few bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        save()
    except (UserError, distributed.OutOfStep) as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "not refused"


@pytest.fixture(scope="module", name="saved")
def _saved(tmp_path_factory):
    """The folder with everything, the parameters, and what each process has seen."""
    folder, params = tmp_path_factory.mktemp("hosts"), random_params(CONFIG)
    hub.save(folder / "saved", CONFIG, params, testing.tiny_tokenizer(), shard_bytes=100_000)
    code = "import sys; from tests.hub import test_hosts; test_hosts.run(sys.argv[1], int(sys.argv[2]), sys.argv[3])"
    command = lambda coordinator, process: [sys.executable, "-c", code, coordinator, str(process), str(folder)]
    with testing.Hosts(command, environment={"PYTHONPATH": os.pathsep.join([str(_ROOT), *sys.path])}) as hosts:
        hosts.finish()
    return folder, params, [json.loads((folder / f"{process}.json").read_text()) for process in range(2)]


_ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mesh", MESHES)
def test_what_two_processes_write_together_is_the_checkpoint(saved, mesh):
    folder, params, _ = saved
    config, read = hub.load(folder / mesh)
    assert config == dataclasses.replace(CONFIG, param_dtype="float32") and equal(read, params)
    names = files.read_json(folder / mesh / "model.safetensors.index.json")["weight_map"]
    assert len(set(names.values())) >= 2
    for file in (description.GENERATION_FILE, "tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        assert (folder / mesh / file).read_bytes() == (folder / "saved" / file).read_bytes()


@pytest.mark.parametrize("mesh", MESHES)
def test_each_process_holds_its_part_and_writes_half(saved, mesh):
    folder, params, seen = saved
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    small = sum(leaf.nbytes for leaf in jax.tree.leaves(params) if leaf.size < 10_000)  # some are on every device
    for process in seen:
        assert process[mesh]["wrote"] < 0.65 * total
        if mesh in ("expert", "fsdp"):
            assert process[mesh]["held"] <= 0.5 * total + 4 * small
    assert sum(process[mesh]["wrote"] for process in seen) >= total
    if mesh == "expert":  # nobody reads experts that lie on the other host
        experts = sum(leaf.nbytes for path, leaf in jax.tree_util.tree_leaves_with_path(params)
                      if any(key.key == "experts" for key in path))
        assert all(process[mesh]["read"] <= total - experts / 2 for process in seen)


def test_what_fails_in_one_process_fails_in_both_and_leaves_nothing(saved):
    folder, _, seen = saved
    assert "another process" in seen[0]["full disk"] and "cannot be written: File too large" in seen[1]["full disk"]
    assert "holds other things" in seen[0]["other things"] and "another process" in seen[1]["other things"]
    assert seen[0]["in turn"] == "what the first one says" and "failed in the first process" in seen[1]["in turn"]
    assert all("elsewhere in the program" in line["nested"] for line in seen)  # neither waits for ever
    assert sorted(path.name for path in folder.iterdir()) == sorted(["saved", *MESHES, "0.json", "1.json"])


@pytest.mark.torch
def test_transformers_reads_what_two_processes_wrote(saved):
    import transformers

    folder, params, _ = saved
    model = transformers.Qwen3NextForCausalLM.from_pretrained(folder / "expert")
    weight = model.state_dict()["model.norm.weight"].numpy()
    np.testing.assert_array_equal(weight, params["norm"]["weight"])
    assert model.generation_config.eos_token_id == [testing.tiny_tokenizer().id(token)
                                                    for token in ("<|im_end|>", "<|endoftext|>")]
