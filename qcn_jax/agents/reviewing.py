"""Reviews of pages that agents left: of those whose tests pass, only what survives a look is kept to learn from.

As in the report (arXiv 2603.00729, section 4.2.1); envs.web.judge says what a look is.
"""

import concurrent.futures
from collections.abc import Callable, Mapping, Sequence

from qcn_jax.agents.records import Record
from qcn_jax.agents.services import Services
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.tasks.schema import PAGES, Task
from qcn_jax.envs.web.judge import LEAST
from qcn_jax.journal import Rows

REFUSED, FAILED = "review", "review failed"  # why an episode is dropped: the page scored too little; nobody could look


def review_pages(records: Sequence[Record], tasks: Mapping[str, Task], services: Services, rows: Rows, workers: int
                 ) -> Callable[[Record], str]:
    """Reviews the pages that `records` left, and returns what says why a record is dropped, "" where it is not.

    Args:
      records: that would be kept; those of other tasks than pages are.
      tasks: by id.
      services: with `review`.
      rows: what is known by key of a record, as Review.to_json; new reviews are added.
      workers: reviews side by side.

    Raises:
      UserError: the judge does not answer as it should.
    """
    pages = [record for record in records if tasks[record.instance_id].language == PAGES]
    missing = [record for record in pages if record.key not in rows.known]
    with concurrent.futures.ThreadPoolExecutor(workers, "review") as threads:
        asked = {threads.submit(services.review, tasks[record.instance_id], record.patch): record.key
                 for record in missing}
        for future in concurrent.futures.as_completed(asked):
            try:
                rows.add(asked[future], future.result().to_json())
            except SandboxError:
                continue  # the same command looks again
    keys = {record.key for record in pages}

    def why(record: Record) -> str:
        if record.key not in keys:
            return ""
        found = rows.known.get(record.key)
        return FAILED if found is None else "" if found["score"] >= LEAST else REFUSED

    return why
