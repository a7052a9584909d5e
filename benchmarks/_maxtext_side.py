"""MaxText's side of maxtext_compile.py, run by the Python that has its dependencies; no part of qcn_jax is imported.

    python _maxtext_side.py SOURCES OUT name=value ...

SOURCES is the folder `src` of a checkout of MaxText. Compiles its train step with the given settings and writes the
compiled program's text to OUT.hlo and memory, seconds and versions to OUT.json.
"""

import importlib.metadata
import json
import pathlib
import sys
import time

SOURCES, OUT = sys.argv[1:3]
sys.path.insert(0, SOURCES)

import jax
from maxtext.trainers.pre_train import train_compile


def main() -> None:
    """Compiles through MaxText's own entry, with its last step replaced by one that keeps what it made."""
    # Operations carry the functions that made them as far as the modules, by which their parts are told.
    jax.config.update("jax_traceback_in_locations_limit", 60)
    found = {}

    def compile_and_keep(func, args, kwargs, mesh, in_shardings, out_shardings, static, donated, config, rules):
        with jax.set_mesh(mesh), mesh, rules:
            jitted = jax.jit(func, in_shardings=in_shardings, out_shardings=out_shardings, static_argnums=static,
                             donate_argnums=donated)
            begin = time.perf_counter()
            lowered = jitted.trace(*args, **kwargs).lower(lowering_platforms=("tpu",))
        traced = time.perf_counter()
        # as_text() of the newest libtpu (0.0.52) fails for large programs; the compiler writes the same to a file.
        compiled = lowered.compile(compiler_options={
            "xla_dump_to": OUT, "xla_dump_hlo_as_text": True, "xla_dump_hlo_pass_re": "^$"})
        found["seconds"] = {"trace_and_lower": traced - begin, "compile": time.perf_counter() - traced}
        found["mesh"] = {axis: size for axis, size in mesh.shape.items() if size > 1}
        (text,), stats = pathlib.Path(OUT).glob("*.after_codegen.txt"), compiled.memory_analysis()
        text.rename(f"{OUT}.hlo")
        found["memory"] = {name: getattr(stats, f"{name}_size_in_bytes")
                           for name in ("argument", "temp", "output", "alias", "generated_code")}
        return compiled

    train_compile.jit_and_compile = compile_and_keep
    config = str(pathlib.Path(SOURCES) / "maxtext" / "configs" / "base.yml")
    train_compile.main(["train_compile.py", config, *sys.argv[3:]])
    found["versions"] = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    pathlib.Path(f"{OUT}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
