"""Several workers of the training engine as plain processes joined by gloo, as Ray Train joins them."""

from __future__ import annotations

import os
import pickle
import socket
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from jobs.train.loop import TrainTask, train
from jobs.train.pass_size import Choice, settle
from jobs.train.session import LocalSession
from service.spec.job import JobSpec
from service.storage import Storage


class GlooSession(LocalSession):
    """One worker among several."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.workers = dist.get_rank(), dist.get_world_size()


def train_in_processes(tasks: list[TrainTask], workers: int) -> list[dict[str, Any]]:
    """Run the tasks one after the other in a group of workers.

    Returns:
        per task {"result" or "error", "events", "random": each worker's next random number}.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Spawned processes inherit nothing that this one has done with torch.
    processes = mp.spawn(_worker, args=(tasks, workers, port), nprocs=workers, join=False)
    while not processes.join(timeout=240):
        pass
    found = [[pickle.loads(_report(task, rank).read_bytes()) for rank in range(workers)] for task in tasks]
    return [ranks[0] | {"random": [each["random"] for each in ranks]} for ranks in found]


def _report(task: TrainTask, rank: int) -> Path:
    return Path(task.root) / f"report-{rank}.pickle"


def _worker(rank: int, tasks: list[TrainTask], workers: int, port: int) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "LOCAL_WORLD_SIZE": workers}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what the tests expect are the CPU's numbers
    dist.init_process_group("gloo")
    for task in tasks:
        session = GlooSession()
        report: dict[str, Any] = {}
        try:
            report["result"] = train(task, session)
        except Exception as error:  # noqa: BLE001  # the test looks at it
            report["error"], report["traceback"] = f"{type(error).__name__}: {error}", traceback.format_exc()
        report |= {"events": session.events, "random": float(torch.rand(()))}
        _report(task, rank).write_bytes(pickle.dumps(report))
    dist.destroy_process_group()


def settle_in_processes(spec: JobSpec, root: Path, sizes: list[int]) -> list[Any]:
    """What each of as many workers takes as the run's passes, where these are their own choices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_settle, args=(spec.to_json(), root, sizes, port), nprocs=len(sizes))
    return [pickle.loads((root / f"settled-{rank}.pickle").read_bytes()) for rank in range(len(sizes))]


def _settle(rank: int, spec: str, root: Path, sizes: list[int], port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(len(sizes))}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo")
    made, size = JobSpec.model_validate_json(spec), sizes[rank]

    def choose(sharers: int) -> Choice:
        assert sharers == len(sizes), "all are on this node"
        return Choice(size, made.training.clips_per_step // size, "a test", 100 * size)

    found = settle(Storage(str(root)), made, rank, choose)
    (root / f"settled-{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()
