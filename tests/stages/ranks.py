"""Two ranks in forked processes: each test file launches them once."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch


def run_two_ranks(work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(*arguments)` on two ranks and wait for them; a rank's error is printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_work, args=(rank, port, work, *arguments)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(250)  # the ranks deadlock where one makes more calls than the other
    for process in started:
        if process.is_alive():
            process.kill()


def _work(rank: int, port: int, work: Callable[..., None], *arguments: Any) -> None:
    status = 1
    try:
        torch.set_num_threads(1)
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2}
        os.environ.update({name: str(value) for name, value in where.items()})
        work(rank, *arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
