"""The swesmith half of synthesis_vs_swesmith.py; runs in an interpreter that has the swesmith package, not ours.

    python _swesmith_side.py JOB.json       in a folder of its own

The package's own generators (bug_gen.procedural) and validation (harness.valid) run unchanged. What it would get from
GitHub and a registry it gets from the job: a folder instead of its mirror, an image that was built before.
"""

import json
import random
import shutil
import sys
import time
from pathlib import Path

from swesmith import constants
from swesmith.bug_gen import collect_patches
from swesmith.bug_gen.procedural import generate
from swesmith.harness import valid
from swesmith.profiles import registry
from swesmith.profiles.python import PythonProfile


def register(spec):
    """Makes a profile for one repository and returns its name."""

    class Profile(PythonProfile):
        def clone(self, dest=None):
            dest = dest or self.repo_name
            if Path(dest).exists():
                return dest, False
            shutil.copytree(spec["folder"], dest)
            return dest, True

        def pull_image(self):
            pass

        def _is_repo_private(self):
            return False

        @property
        def image_name(self):
            return spec["image"]

    Profile.__name__ = f"Profile{spec['repo'].title()}"
    Profile.owner, Profile.repo, Profile.commit = "pypi", spec["repo"], spec["commit"]
    Profile.__init__ = lambda self: PythonProfile.__init__(self, test_cmd=spec["test"])
    registry.register_profile(Profile)
    profile = Profile()
    profile.owner, profile.repo, profile.commit = "pypi", spec["repo"], spec["commit"]
    registry.data[profile.repo_name] = lambda: profile
    return profile.repo_name


def main(path):
    """Generates, samples, validates; writes result.json: by kind, candidates and those with a failing test."""
    job = json.loads(Path(path).read_text())
    rows, seconds = [], {"generate": 0.0, "validate": 0.0}
    for spec in job["repositories"]:
        name = register(spec)
        started = time.monotonic()
        generate.main(name, -1, job["seed"])
        folder = constants.LOG_DIR_BUG_GEN / name
        collect_patches.main(folder)
        patches_file = folder.parent / f"{name}_all_patches.json"
        seconds["generate"] += time.monotonic() - started
        patches = json.loads(patches_file.read_text())
        by_kind = {}
        for patch in sorted(patches, key=lambda patch: patch["instance_id"]):
            by_kind.setdefault(patch["strategy"], []).append(patch)
        rng = random.Random(job["seed"])
        chosen = [patch for kind in sorted(by_kind)
                  for patch in rng.sample(by_kind[kind], min(job["per_kind"], len(by_kind[kind])))]
        patches_file.write_text(json.dumps(chosen))
        started = time.monotonic()
        valid.main(str(patches_file), job["workers"])
        seconds["validate"] += time.monotonic() - started
        for patch in chosen:
            report = constants.LOG_DIR_RUN_VALIDATION / name / patch["instance_id"] / "report.json"
            found = json.loads(report.read_text()) if report.exists() else {}
            kept = bool(found.get("FAIL_TO_PASS"))
            rows.append({"repository": spec["repo"], "kind": patch["strategy"], "kept": kept})
    Path("result.json").write_text(json.dumps({"rows": rows, "seconds": seconds}))


if __name__ == "__main__":
    main(sys.argv[1])
