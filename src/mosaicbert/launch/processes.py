"""One process for each GPU, started by the command itself; or this process as one of many.

What decides, in this order:

| found | what happens |
|---|---|
| `RANK`, `WORLD_SIZE` and `LOCAL_RANK` (torchrun, or a child of ours) | this process joins |
| a Slurm step with one task for each rank | this process joins |
| a Slurm step with one task for each node | this node's share is started |
| `--world_size --node_rank --master_addr --master_port`, or those in capitals | the same |
| several GPUs, or `--nproc` | that many processes on this machine |
| none of these | this process is alone |

The children run the very command line of this process. Restarting a run that lost a node with
other nodes is torchrun's job: `torchrun ... -m mosaicbert pretrain ...` joins as it is.
"""

import argparse
import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mosaicbert.errors import ConfigError
from mosaicbert.launch.supervisor import supervise
from mosaicbert.slurm import meeting_point

DEFAULT_PORT = 29500
GROUP_FLAGS = ("world_size", "node_rank", "master_addr", "master_port")


@dataclass(frozen=True, slots=True)
class NodeShare:
    """The processes that this machine adds to a run."""

    nproc: int
    world_size: int
    node_rank: int
    master_addr: str
    master_port: int

    @property
    def num_nodes(self) -> int:
        """Machines of the run, each with as many processes as this one."""
        return self.world_size // self.nproc

    def environments(self, environ: Mapping[str, str]) -> list[dict[str, str]]:
        """The environment of each process: `environ` and torchrun's variables."""
        threads = max(1, (os.cpu_count() or 1) // self.nproc)
        common = {
            "OMP_NUM_THREADS": str(threads),
            **environ,
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.nproc),
            "GROUP_RANK": str(self.node_rank),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }
        first = self.node_rank * self.nproc
        return [
            {**common, "RANK": str(first + local), "LOCAL_RANK": str(local)}
            for local in range(self.nproc)
        ]


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say how many processes there are, and where."""
    group = parser.add_argument_group(
        "several processes",
        "By default one process for each GPU of this machine. On several machines, start the same "
        "command on each, with the flags below or the variables of the same name in capitals.",
    )
    group.add_argument("--nproc", type=int, help="processes on this machine (CPU: through gloo)")
    group.add_argument("--world_size", type=int, help="processes on all machines together")
    group.add_argument("--node_rank", type=int, help="number of this machine, from 0")
    group.add_argument("--master_addr", help="address of machine 0")
    group.add_argument("--master_port", type=int, help="free port of machine 0")


def launch(
    args: argparse.Namespace,
    run: Callable[[], int],
    *,
    device: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> int:
    """Call `run` in this process, or start processes that do and wait for them.

    Args:
        args: with the fields of `add_launch_arguments`.
        run: the job; returns an exit code.
        device: `cpu` leaves GPUs out of account.
        environ: variables that decide, and that children inherit.

    Returns:
        The exit code: of `run`, or of the process that failed first (128 + N for signal N).

    Raises:
        ConfigError: flags or variables that do not fit together.
    """
    share = decide(args, environ, lambda: 0 if device == "cpu" else count_gpus())
    if share is None:
        return run()
    command = [sys.executable, *sys.orig_argv[1:]]
    return supervise(command, share.environments(environ), num_nodes=share.num_nodes)


def decide(
    args: argparse.Namespace, environ: Mapping[str, str], num_gpus: Callable[[], int]
) -> NodeShare | None:
    """What to start here; None to run in this process. See the table above."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        if "LOCAL_RANK" not in environ:
            raise ConfigError(
                "RANK and WORLD_SIZE are set, but LOCAL_RANK is not. A launcher that starts each "
                "process sets all three; to start a machine's share, set WORLD_SIZE, NODE_RANK, "
                "MASTER_ADDR and MASTER_PORT, and unset RANK."
            )
        return None
    if args.nproc is not None and args.nproc < 1:
        raise ConfigError(f"--nproc {args.nproc}: there must be at least 1 process.")
    told = {name: _told(args, environ, name) for name in GROUP_FLAGS}
    if told["world_size"] is None and _slurm_tasks(environ) > 1:
        return _slurm_share(args, environ, num_gpus)
    nproc = args.nproc or max(num_gpus(), 1)
    if told["world_size"] is None:
        if args.node_rank is not None or args.master_addr is not None:
            raise ConfigError("--node_rank and --master_addr need --world_size (or WORLD_SIZE).")
        return None if nproc == 1 else _alone_here(nproc, told)
    if args.nproc is not None and _number(told, "world_size", 1) < args.nproc:
        raise ConfigError(
            f"world_size {told['world_size']} is less than --nproc {args.nproc}. world_size counts "
            "the processes of all machines together: raise it, or lower --nproc."
        )
    return _told_share(told, nproc)


def _told(args: argparse.Namespace, environ: Mapping[str, str], name: str) -> str | None:
    """A flag, else the variable of its name."""
    flag = getattr(args, name)
    return environ.get(name.upper()) if flag is None else str(flag)


def _told_share(told: Mapping[str, str | None], nproc: int) -> NodeShare | None:
    world_size = _number(told, "world_size", 1)
    if world_size <= nproc:  # one machine; fewer processes than GPUs are fine
        if told["node_rank"] is not None and _number(told, "node_rank", 0) > 0:
            raise ConfigError(
                f"node_rank {told['node_rank']}: world_size {world_size} counts the processes of "
                f"all machines together, and this one alone takes {nproc}, so there is no other. "
                "Raise world_size, or set by --nproc how many each machine takes."
            )
        return None if world_size == 1 else _alone_here(world_size, told)
    missing = [name for name in ("node_rank", "master_addr") if told[name] is None]
    if missing:
        flags = " and ".join(f"--{name} ({name.upper()})" for name in missing)
        raise ConfigError(
            f"world_size {world_size} needs several machines with {nproc} processes each, but "
            f"these are not given: {flags}. On one machine alone, --nproc {world_size} is enough."
        )
    if world_size % nproc:
        raise ConfigError(
            f"world_size {world_size} is not a multiple of the {nproc} processes of this machine. "
            "All machines must have as many; --nproc sets how many."
        )
    node_rank = _number(told, "node_rank", 0)
    if node_rank >= world_size // nproc:
        raise ConfigError(
            f"node_rank {node_rank}: world_size {world_size} with {nproc} processes a machine "
            f"makes {world_size // nproc} machines, numbered from 0."
        )
    port = _port(told) or DEFAULT_PORT
    return NodeShare(nproc, world_size, node_rank, str(told["master_addr"]), port)


def _number(told: Mapping[str, str | None], name: str, least: int) -> int:
    text = str(told[name])
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name} (or {name.upper()}): {text!r} is no number from {least} up.")
    return int(text)


def _port(told: Mapping[str, str | None]) -> int | None:
    return None if told["master_port"] is None else _number(told, "master_port", 1)


def _alone_here(nproc: int, told: Mapping[str, str | None]) -> NodeShare:
    return NodeShare(nproc, nproc, 0, "127.0.0.1", _port(told) or free_port())


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    """Tasks of the Slurm step (`srun`) this process belongs to; 0 outside of one."""
    return int(environ.get("SLURM_STEP_NUM_TASKS", 0)) if "SLURM_PROCID" in environ else 0


def _slurm_share(
    args: argparse.Namespace, environ: Mapping[str, str], num_gpus: Callable[[], int]
) -> NodeShare | None:
    """One task a node starts the node's processes; any other number of tasks is one a rank."""
    num_nodes = int(environ.get("SLURM_STEP_NUM_NODES", 1))
    nproc = args.nproc or max(num_gpus(), 1)
    if _slurm_tasks(environ) != num_nodes or nproc == 1:
        return None
    host, port = meeting_point(environ)
    return NodeShare(nproc, nproc * num_nodes, int(environ["SLURM_NODEID"]), host, port)


def count_gpus() -> int:
    """GPUs that torch sees."""
    import torch  # late: it takes seconds, and most ways here do not need it

    return torch.cuda.device_count()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
