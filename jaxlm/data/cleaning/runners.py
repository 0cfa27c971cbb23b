"""Where the work of the stages is done: processes of this machine, or a cluster, through Apache Beam.

A runner has `map(function, items)`: `function` is pure but for the files it writes, so it does not matter where it runs, in
which order, or whether twice. What comes back is its result for each item, in any order.
"""

import concurrent.futures
import multiprocessing
import os
import shlex
import threading
from collections.abc import Iterator

from jaxlm.errors import UserError
from jaxlm.registry import Registry

RUNNERS = Registry("runner", key="--runner")


@RUNNERS.register("local")
class LocalRunner:
    """workers: processes; 0: one for each CPU; 1: this process."""

    def __init__(self, workers: int, options: str):
        if workers < 0:
            raise UserError(f"--workers={workers}: must be at least 1, or 0 for one a CPU")
        if options:
            raise UserError(f"--runner_options={options}: are of --runner=beam; remove them")
        self.workers = workers or len(os.sched_getaffinity(0))

    def map(self, function, items) -> Iterator:
        if self.workers == 1 or len(items) == 1:
            yield from map(function, items)
            return
        # Spawned, not forked: the parent may hold threads (a progress display, a JAX that is loaded already).
        with concurrent.futures.ProcessPoolExecutor(min(self.workers, len(items)), multiprocessing.get_context("spawn"),
                                                    initializer=end_with_parent) as pool:
            try:
                waiting = [pool.submit(function, item) for item in items]
                for done in concurrent.futures.as_completed(waiting):
                    yield done.result()
            except concurrent.futures.process.BrokenProcessPool as error:
                raise UserError("a worker process was killed, perhaps for want of memory; run the same command again, with "
                                "fewer --workers") from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@RUNNERS.register("beam")
class BeamRunner:
    """Each stage is one pipeline. options: Beam's own, such as "--runner=FlinkRunner --flink_master=host:8081"; without them,
    Beam's in-process runner. All workers must see --out and the sources under the same paths."""

    def __init__(self, workers: int, options: str):
        try:
            import apache_beam  # noqa: F401
        except ImportError as error:
            raise UserError(f"--runner=beam: Apache Beam cannot be imported ({error}); pip install 'jaxlm[beam]'") from error
        self.options = shlex.split(options)
        if not any(option.startswith("--runner") for option in self.options):
            # "DirectRunner" would fetch a program from the network.
            processes = ["--direct_running_mode=multi_processing", f"--direct_num_workers={workers}"] if workers > 1 else []
            self.options += ["--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner", *processes]

    def map(self, function, items) -> Iterator:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

        with beam.Pipeline(options=PipelineOptions(self.options)) as pipeline:
            _ = pipeline | beam.Create(list(items)) | beam.Reshuffle() | beam.Map(function)
        yield from (None for _ in items)  # what it found is in the files it wrote
