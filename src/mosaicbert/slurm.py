"""What Slurm's variables say of where a run's processes meet.

The launcher and the processes it starts both ask; light, so that either may import it.
"""

import re
from collections.abc import Mapping


def meeting_point(environ: Mapping[str, str]) -> tuple[str, int]:
    """Address and port of a step's first process: `MASTER_ADDR` and `MASTER_PORT` win.

    Else the step's first host, and a port by the job's number: the same on all nodes.
    """
    host = environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", "localhost"))
    port = environ.get("MASTER_PORT") or 20000 + int(environ.get("SLURM_JOB_ID", 0)) % 20000
    return host, int(port)


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list: `gpu[003-007,9],login1` -> `gpu003`."""
    match = re.match(r"([^\[,]+)(?:\[(\w+))?", node_list)
    assert match, f"{node_list!r} is no Slurm node list"
    return match[1] + (match[2] or "")
