"""Slurm's variables."""

import pytest

from mosaicbert.slurm import first_host, meeting_point


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[003-007,9],login1", "gpu003"),
        ("a1,a2", "a1"),
        ("n", "n"),
        ("x-[1,3]", "x-1"),
        ("host-a", "host-a"),
        ("x[7]", "x7"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


def test_all_processes_of_a_job_meet_at_one_place():
    step = {"SLURM_STEP_NODELIST": "gpu[003-004]", "SLURM_JOB_ID": "20042"}
    assert meeting_point(step) == ("gpu003", 20042)
    assert meeting_point({**step, "SLURM_JOB_ID": "40043"}) == ("gpu003", 20043)
    assert meeting_point({**step, "MASTER_ADDR": "a", "MASTER_PORT": "7"}) == ("a", 7)
