import shutil
import subprocess

import pytest

from mosaicbert.cli import COMMANDS, main
from mosaicbert.completion import keys_of, script, words_of
from mosaicbert.config.jobs import PretrainConfig


@pytest.fixture(scope="module")
def words():
    return words_of({name: command.module for name, command in COMMANDS.items()})


def complete(tmp_path, text, line):
    """What bash offers at the end of `line`."""
    (tmp_path / "completion").write_text(text)
    program = f"""
    source {tmp_path}/completion
    COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}
    read -ra COMP_WORDS <<< '{line}'; [[ '{line}' == *' ' ]] && COMP_WORDS+=('')
    COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
    _mosaicbert; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mosaicbert pre", ["pretrain", "predict"]),
        ("mosaicbert plan a.yaml --gp", ["--gpus", "--gpu"]),
        ("mosaicbert pretrain a.yaml optimizer.l", ["optimizer.lr="]),
        ("mosaicbert config sh", ["show"]),
        ("mosaicbert completion f", ["fish"]),
        ("mosaicbert pretrain run", ["run_name=", "run_folder="]),
        ("mosaicbert inspect ya", ["yamls.yaml"]),
    ],
)
def test_bash_completes(tmp_path, words, line, expected):
    (tmp_path / "yamls.yaml").touch()
    assert sorted(complete(tmp_path, script("bash", words), line)) == sorted(expected)


def test_every_command_and_flag_is_in_every_script(words, capsys):
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        text = capsys.readouterr().out
        assert all(name in text for name in COMMANDS)
        assert "--gpus" in text
        assert "optimizer.lr=" in text


def test_keys_are_those_of_the_schema():
    keys = list(keys_of(PretrainConfig))
    assert "train_loader.dataset.streams" in keys
    assert "model.model_config" in keys
    assert "callbacks.health_checker.on_nan" in keys
    assert len(keys) == len(set(keys))
