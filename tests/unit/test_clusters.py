"""Cluster files against golden ones. After a change meant: WRITE_GOLDEN=1 pytest this file."""

import argparse
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from mosaicbert.errors import ConfigError
from mosaicbert.launch.clusters import add_arguments, kind_of, main, read_run, render

GOLDEN = Path(__file__).parents[1] / "golden" / "clusters"
EXAMPLES = Path(__file__).parents[2] / "yamls" / "cluster"


def arguments(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def rendered(*words):
    return render(arguments(*words))


CASES = {
    "job.sbatch": ["--to", "slurm", "job.yaml", "--nodes", "2", "--partition", "gpu"],
    "job-container.sbatch": ["--to=slurm", "job.yaml", "--image", "me/bert:1", "--account=ab"],
    "job.jobset.yaml": ["--to=kubernetes", "job.yaml", "--nodes=2", "--volume=c4:/data"],
    "job.sky.yaml": ["--to=skypilot", "job.yaml", "--nodes=2", "--gpu_type=H100", "--env=A=b c"],
    "mcloud_run.sbatch": ["--to=slurm", "mcloud_run.yaml"],
    "mcloud_run-container.sbatch": ["--to=slurm", "mcloud_run.yaml", "--image=me/bert:1"],
    "mcloud_run.jobset.yaml": ["--to=kubernetes", "mcloud_run.yaml", "--secret=keys"],
    "mcloud_run.sky.yaml": ["--to=skypilot", "mcloud_run.yaml"],
    "glue.jobset.yaml": ["--to=kubernetes", "glue.yaml", "--gpus=4"],
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name, monkeypatch):
    monkeypatch.chdir(GOLDEN)
    text = rendered(*CASES[name])
    path = GOLDEN / name
    if os.environ.get("WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize(
    ("to", "ending"), [("slurm", "sbatch"), ("kubernetes", "jobset.yaml"), ("skypilot", "sky.yaml")]
)
def test_the_examples_are_what_the_command_makes(to, ending, monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    text = rendered("--to", to, "mcloud_run.yaml")
    path = EXAMPLES / f"mcloud_run.{ending}"
    if os.environ.get("WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("sbatch")])
def test_the_configuration_survives(name):
    documents = list(yaml.safe_load_all((GOLDEN / name).read_text()))
    source = yaml.safe_load((GOLDEN / f"{name.split('.')[0]}.yaml").read_text())
    if "data" in documents[0]:
        carried = documents[0]["data"]["config.yaml"]
    else:
        carried = documents[0]["run"].split("END_OF_CONFIG'\n")[1].split("\nEND_OF_CONFIG")[0]
    expected = source.get("parameters", source)
    if "parameters" in source:
        expected["run_name"] = source["name"]
    assert yaml.safe_load(carried) == expected


def run_script(script, folder, **environ):
    """Run a script with stand-ins for what it calls; returns what they were called with."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    calls = folder / "calls"
    for name in ("srun", "mosaicbert"):
        tool = bin_folder / name
        tool.write_text(
            f'#!/bin/bash\necho "{name} $*" >> {calls}\n'
            'for word; do [ -f "$word" ] && cp "$word" seen.yaml; done\n'
            f'env | grep -E "^(WORLD|NODE|MASTER|WANDB|A)" | sort > {folder}/env\nexit 0\n'
        )
        tool.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env={"PATH": f"{bin_folder}:/usr/bin:/bin", **environ},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    variables = dict(line.split("=", 1) for line in (folder / "env").read_text().splitlines())
    return calls.read_text().splitlines(), variables


SLURM = {"SLURM_JOB_NAME": "big-run-01", "SLURM_JOB_ID": "42"}


def test_the_slurm_script_starts_one_task_a_machine(tmp_path):
    (call,), _ = run_script((GOLDEN / "job.sbatch").read_text(), tmp_path, **SLURM)
    config = tmp_path / "big-run-01-42.yaml"
    assert call == f"srun --kill-on-bad-exit=1 mosaicbert pretrain {config} autoresume=true"
    assert yaml.safe_load(config.read_text()) == yaml.safe_load((GOLDEN / "job.yaml").read_text())


def test_the_originals_preparation_and_overrides_are_carried_over(tmp_path):
    script = (GOLDEN / "mcloud_run.sbatch").read_text()
    calls, variables = run_script(script, tmp_path, **SLURM)
    assert calls[0] == (
        "mosaicbert convert --dataset c4 --data_subset en --out_root ./my-copy-c4 "
        "--splits train_small val"
    )
    assert calls[1].endswith("big-run-01-42.yaml train_loader.dataset.split=train_small")
    assert variables["WANDB_MODE"] == "offline"
    assert "# Not carried over: command: nvidia-smi" in script
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "my-copy-c4").mkdir()
    again, _ = run_script(script, tmp_path / "again", **SLURM)
    assert again[0] == calls[0], "a folder that is there may be that of a conversion cut short"


def test_with_an_image_the_preparation_runs_in_the_container_too(tmp_path):
    script = rendered("--to=slurm", GOLDEN / "mcloud_run.yaml", "--image=me/bert:1", "--cpus=4")
    calls, _ = run_script(script, tmp_path, **SLURM)
    container = f"--container-image=me/bert:1 --container-mounts={tmp_path} --container-workdir="
    prepare = f"srun --nodes=1 --ntasks=1 --cpus-per-task=32 {container}{tmp_path} "
    assert calls[0].startswith(f"{prepare}mosaicbert convert --dataset c4 ")
    assert calls[1].startswith(f"srun --kill-on-bad-exit=1 {container}{tmp_path} mosaicbert ")


def test_the_skypilot_task_tells_each_machine_its_place(tmp_path):
    task = yaml.safe_load((GOLDEN / "job.sky.yaml").read_text())
    assert task["resources"] == {"accelerators": "H100:8"}
    (call,), variables = run_script(
        task["run"], tmp_path, SKYPILOT_NODE_RANK="1", SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2"
    )
    assert call == "mosaicbert pretrain config.yaml autoresume=true"
    assert variables == {
        "WORLD_SIZE": "16",
        "NODE_RANK": "1",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
    }


def test_the_jobset_has_one_pod_a_machine():
    _, job_set = yaml.safe_load_all((GOLDEN / "job.jobset.yaml").read_text())
    (replicated,) = job_set["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (2, 2, "Indexed")
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    variables = {each["name"]: each.get("value") for each in container["env"]}
    assert variables["WORLD_SIZE"] == "16"
    name = job_set["metadata"]["name"]
    assert variables["MASTER_ADDR"] == f"{name}-{replicated['name']}-0-0.{name}"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_glue_shares_one_machine():
    _, job_set = yaml.safe_load_all((GOLDEN / "glue.jobset.yaml").read_text())
    pod = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["env"] == []
    with pytest.raises(ConfigError, match="--nodes 1"):
        rendered("--to=slurm", GOLDEN / "glue.yaml", "--nodes=2")


@pytest.mark.parametrize(
    ("values", "command"),
    [
        ({"tasks": {}}, "glue"),
        ({"train_loader": {"split": "train"}}, "classify"),
        ({"train_loader": {"dataset": {"split": "train"}}}, "pretrain"),
    ],
)
def test_kinds(values, command):
    assert kind_of(values)[0] == command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["job.yaml", "--gpus=3"], "not divisible by the 3 ranks"),
        (["job.yaml", "--nodes=0"], "at least 1"),
        (["job.yaml", "max_duratoin=1ba"], "max_duration"),
        (["job.yaml", "--name=!"], "--name"),
        (["job.yaml", "--env=A"], "NAME=VALUE"),
        (["job.yaml", "--to=skypilot"], "--gpu_type"),
        (["job.yaml", "--to=kubernetes", "--volume=c4"], "CLAIM:/path"),
        (["nothing.yaml"], "cannot be read"),
    ],
)
def test_mistakes(words, message, monkeypatch):
    monkeypatch.chdir(GOLDEN)
    with pytest.raises(ConfigError, match=message):
        rendered("--to=slurm", *words)


def test_unknown_keys_of_a_cloud_run(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: x\nimagee: y\nparameters: {}\n")
    with pytest.raises(ConfigError, match=r'imagee: unknown key\. Did you mean "image"'):
        rendered("--to=slurm", path)
    path.write_text("compute: {gpu: 1}\nparameters: {}\n")
    with pytest.raises(ConfigError, match=r"compute\.gpu: unknown key"):
        rendered("--to=slurm", path)


@pytest.mark.parametrize(
    ("line", "overrides", "left_out"),
    [
        ("echo it's on", [], ["command: echo it's on"]),
        (
            "composer main.py p.yaml run_name='x",
            [],
            ["command: composer main.py p.yaml run_name='x"],
        ),
        ("composer main.py p.yaml seed=1 # it's on", ["seed=1"], []),
        (
            "A=b KEY='c d' composer main.py seed=1",
            ["seed=1"],
            [f"variable of the command: {name} (give it by --env)" for name in ("A", "KEY")],
        ),
        ("composer -n=8 main.py --v=1 seed=1", ["seed=1"], []),
    ],
)
def test_commands_of_a_cloud_run(line, overrides, left_out, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"command": line, "parameters": {}}))
    run = read_run(path)
    assert (run.overrides, run.left_out) == (overrides, left_out)


def test_main_writes_the_file(tmp_path, capsys):
    out = tmp_path / "job.sbatch"
    words = ["--to=slurm", GOLDEN / "job.yaml", "--out", out]
    assert main(arguments(*words)) == 0
    assert capsys.readouterr().out == f"{out}: hand it in with sbatch {out}\n"
    assert out.read_text().startswith("#!/bin/bash\n")
    assert main(arguments(*words[:2])) == 0
    assert capsys.readouterr().out == out.read_text()
