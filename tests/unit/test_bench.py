"""The bench: its samples, its counts and its command."""

import json

import numpy as np
import pytest
import torch

from mosaicbert import bench, cli
from mosaicbert.config import PretrainConfig
from mosaicbert.train.distributed import Ranks

TINY = {
    "max_duration": "4ba",
    "global_train_batch_size": 6,
    "device_train_microbatch_size": 4,
    "device": "cpu",
    "max_seq_len": 16,
    "model": {
        "name": "mosaic_bert",
        "pretrained_model_name": "prajjwal1/bert-tiny",
        "model_config": {"hidden_size": 32, "intermediate_size": 48},
    },
    "train_loader": {"dataset": {"mlm_probability": 0.3}},
}
CPU = Ranks(0, 1, 0, torch.device("cpu"))


def test_samples_have_the_mix_of_lengths_and_masks() -> None:
    samples = bench.made_up_samples(4000, 64, vocab_size=3000, mlm_probability=0.3)
    lengths = np.array([len(sample.input_ids) for sample in samples])
    assert abs((lengths == 64).mean() - 0.7) < 0.03
    short = lengths[lengths < 64]
    assert (short.min(), short.max()) == (8, 63)
    masked = sum(len(sample.target_positions) for sample in samples)
    assert abs(masked / lengths.sum() - 0.3) < 0.01
    again = bench.made_up_samples(4000, 64, vocab_size=3000, mlm_probability=0.3)
    assert all(
        np.array_equal(a.input_ids, b.input_ids) for a, b in zip(samples, again, strict=True)
    )


@pytest.mark.parametrize("name", ["mosaic_bert", "hf_bert"])
def test_a_step_trains_and_counts_real_tokens(name: str) -> None:
    config = PretrainConfig.model_validate(TINY | {"model": {**TINY["model"], "name": name}})
    found = bench.bench_of(config, CPU)
    assert len(found.microbatches) == 2
    assert found.num_samples == 6
    before = [p.detach().clone() for p in found.model.parameters()]
    assert found.step().isfinite()
    assert any(not torch.equal(a, b) for a, b in zip(before, found.model.parameters(), strict=True))
    rates = found.rates(2.0)
    assert rates["tokens_per_second"] == found.num_tokens / 2
    assert rates["mfu"] is None
    assert found.peak_bytes() is None


def test_command(tmp_path, capsys) -> None:
    import yaml

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(TINY))
    out = tmp_path / "record.json"
    words = ["bench", str(tmp_path / "run.yaml"), "--steps", "2", "--out", str(out), "seed=3"]
    assert cli.main(words) == 0
    record = json.loads(out.read_text())
    assert len(record["step_seconds"]) == 2
    assert record["samples_per_step"] == 6
    assert "tokens a second" in capsys.readouterr().out
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples_per_step"] == 6
