"""One run on the workers of a Ray cluster: python examples/launch/ray_train.py run.yaml WORKERS [KEY=VALUE ...]

Ray starts a process for each rank and says which one it is; deft does the rest, its own collectives included. All
machines see the folder of the run. A worker that is lost ends the attempt, and the next goes on from the last save.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import ray
import torch
from ray import train
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


def rank(asked: dict[str, Any]) -> None:
    """One rank of the run, with what torchrun would say to it in the environment."""
    from deft.run import config
    from deft.run.train import train as run

    me = train.get_context()
    with socket.socket() as free:
        free.bind(("", 0))
        mine = [ray.util.get_node_ip_address(), free.getsockname()[1]]
    address, port = broadcast_from_rank_zero(mine)
    named = {"RANK": me.get_world_rank(), "LOCAL_RANK": me.get_local_rank(), "WORLD_SIZE": me.get_world_size()}
    named |= {"GROUP_RANK": me.get_node_rank(), "MASTER_ADDR": address, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in named.items()})
    run(config.load(asked["file"], asked["overrides"]))


def main(file: str, workers: str, *overrides: str) -> None:
    """Runs the file on so many workers, with a GPU each where there are any."""
    trainer = DataParallelTrainer(
        rank,
        train_loop_config={"file": os.path.abspath(file), "overrides": [*overrides]},
        scaling_config=train.ScalingConfig(num_workers=int(workers), use_gpu=torch.cuda.is_available()),
        run_config=train.RunConfig(failure_config=train.FailureConfig(max_failures=3)),
    )
    trainer.fit()


if __name__ == "__main__":
    main(*sys.argv[1:])
