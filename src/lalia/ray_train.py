"""The command line on the workers of a Ray cluster: `python -m lalia.ray_train --workers 4 -- pretrain RECIPE ...`.

Every worker runs the same verb with the same arguments, as under `torchrun -m -- lalia ...`: Ray Train forms the
process group and sets the environment variables that torchrun would set. All workers must see the run folder.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from lalia.errors import UserError


def main(arguments: list[str] | None = None) -> None:
    """Parse, connect to (or start) a cluster, run the verb on its workers.

    Raises:
        UserError: if Ray is not installed, or the workers failed for good.
    """
    parser = argparse.ArgumentParser(prog="python -m lalia.ray_train", description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="processes that train together")
    parser.add_argument("--cpus", type=int, default=1, help="processors of each worker")
    parser.add_argument("--gpu", action="store_true", help="one GPU for each worker")
    parser.add_argument("--address", help="of a running cluster; without it one is started on this machine")
    parser.add_argument("--max-failures", type=int, default=3, help="times that lost workers are started again")
    parser.add_argument("verb", nargs=argparse.REMAINDER, help="a verb of lalia and its arguments, after --")
    options = parser.parse_args(arguments)
    verb = options.verb[1:] if options.verb[:1] == ["--"] else options.verb
    if not verb:
        raise UserError("give a verb to run, for example: python -m lalia.ray_train --workers 2 -- pretrain RECIPE")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise UserError(f'training on Ray needs {error.name}; install it with: pip install "lalia[cluster]"') from None
    ray.init(address=options.address, include_dashboard=False, log_to_driver=True)
    resources = {"CPU": options.cpus, **({"GPU": 1} if options.gpu else {})}
    trainer = TorchTrainer(
        work,
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if options.gpu else "gloo"),
        train_loop_config={"verb": verb, "folder": os.getcwd()},
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=options.gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name="lalia",
            storage_path=str(Path("runs").resolve() / ".ray"),
            failure_config=FailureConfig(max_failures=options.max_failures),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        if type(error).__module__.split(".")[0] != "ray":
            raise
        raise UserError(f"the workers failed: {error}") from error
    finally:
        ray.shutdown()


def work(settings: dict[str, Any]) -> None:
    """What each worker does."""
    from lalia.cli import app

    os.chdir(settings["folder"])
    app(settings["verb"], standalone_mode=False)


if __name__ == "__main__":
    try:
        main()
    except UserError as problem:
        sys.exit(f"lalia: {problem}")
