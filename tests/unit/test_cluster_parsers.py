"""Cluster files in front of the parsers of those who take them.

SkyPilot needs an environment of its own; skipped without one:

    python -m venv VENV && VENV/bin/pip install skypilot kubernetes-validate
    CLUSTER_PYTHON=VENV/bin/python scripts/test tests/unit/test_cluster_parsers.py
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT / "tests/golden/clusters", ROOT / "yamls/cluster"]
PYTHON = os.environ.get("CLUSTER_PYTHON")
elsewhere = pytest.mark.skipif(PYTHON is None, reason="CLUSTER_PYTHON is not set")


def files(ending):
    found = [path for folder in FOLDERS for path in sorted(folder.glob(f"*.{ending}"))]
    assert found
    return found


def answer(program, text, home):
    done = subprocess.run(
        [str(PYTHON), "-c", program],
        input=text,
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(home)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


PARSE_TASK = """
import json, sys, yaml
import sky
task = sky.Task.from_yaml_config(yaml.safe_load(sys.stdin))
(resources,) = task.resources
print(json.dumps([task.name, task.num_nodes, resources.accelerators, task.run]))
"""


@elsewhere
@pytest.mark.parametrize("path", files("sky.yaml"), ids=lambda path: path.name)
def test_skypilot_takes_its_task(path, tmp_path):
    text = path.read_text()
    written = yaml.safe_load(text)
    gpu, count = written["resources"]["accelerators"].split(":")
    expected = [written["name"], written["num_nodes"], {gpu: int(count)}, written["run"]]
    assert answer(PARSE_TASK, text, tmp_path) == expected


VALIDATE = """
import json, sys, warnings
import kubernetes_validate
for document in json.load(sys.stdin):
    kubernetes_validate.validate(document, "1.30", strict=True)
print(json.dumps("valid"))
"""


@elsewhere
@pytest.mark.parametrize("path", files("jobset.yaml"), ids=lambda path: path.name)
def test_kubernetes_takes_the_jobs_of_a_job_set(path, tmp_path):
    """A JobSet's own few keys are in no schema here; the jobs in it are Kubernetes' own kind."""
    config_map, job_set = yaml.safe_load_all(path.read_text())
    spec = job_set["spec"]
    jobs = [
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": each["name"]},
            **each["template"],
        }
        for each in spec["replicatedJobs"]
    ]
    assert answer(VALIDATE, json.dumps([config_map, *jobs]), tmp_path) == "valid"


@pytest.mark.parametrize("path", files("sbatch"), ids=lambda path: path.name)
def test_the_shell_takes_the_batch_script(path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("path", files("sky.yaml"), ids=lambda path: path.name)
def test_the_shell_takes_the_tasks_script(path):
    subprocess.run(
        ["bash", "-n"], input=yaml.safe_load(path.read_text())["run"].encode(), check=True
    )
