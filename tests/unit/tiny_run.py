"""A tiny model, a loader and a configuration for tests of the trainer; not a test itself."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from mosaicbert.batch import IGNORE_INDEX, Batch, LossOutput, Step
from mosaicbert.config.jobs import TrainerConfig
from mosaicbert.train.distributed import Ranks
from mosaicbert.train.metrics import MaskedLM
from mosaicbert.train.trainer import Trainer

VOCAB = 32
HIDDEN = 8


class TinyLayer(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.gated_layers = nn.Linear(HIDDEN, 4 * HIDDEN, bias=False)
        self.wo = nn.Linear(2 * HIDDEN, HIDDEN)
        self.layernorm = nn.LayerNorm(HIDDEN)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        gate, up = self.gated_layers(x).chunk(2, dim=-1)
        return self.layernorm(x + self.wo(self.dropout(F.gelu(gate) * up)))


class TinyModel(nn.Module):
    """Predicts each masked token from its own embedding; the decoder is tied."""

    def __init__(self, dropout=0.1, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embeddings = nn.Embedding(VOCAB, HIDDEN)
            self.layer = nn.ModuleList(TinyLayer(dropout) for _ in range(2))
            self.encoder = nn.Module()
            self.encoder.layer = self.layer
            del self.layer
            self.decoder = nn.Linear(HIDDEN, VOCAB)
        self.decoder.weight = self.embeddings.weight

    def loss(self, batch: Batch, return_logits: bool = False) -> LossOutput:
        x = self.embeddings(batch.input_ids)
        for layer in self.encoder.layer:
            x = layer(x)
        logits = self.decoder(x[batch.target_positions]).float()
        loss = F.cross_entropy(logits, batch.labels, reduction="sum", ignore_index=IGNORE_INDEX)
        return LossOutput(loss, logits if return_logits else None)

    def flops_per_token(self, seq_len: float) -> float:
        return 1.0


def make_batch(samples: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
    """Pack (tokens, positions of targets) pairs."""
    lengths = [len(tokens) for tokens, _ in samples]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.concatenate([tokens for tokens, _ in samples])
    where = np.concatenate([at + start for (_, at), start in zip(samples, starts, strict=False)])
    labels = (tokens[where] * 7 + 3) % VOCAB
    if not len(where):
        where, labels = np.array([0]), np.array([IGNORE_INDEX])
    return Batch(
        input_ids=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        num_targets=int((labels != IGNORE_INDEX).sum()),
        num_tokens=len(tokens),
        num_samples=len(samples),
        max_seqlen=max(lengths),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        target_positions=torch.from_numpy(where),
    )


class TinyLoader:
    """Samples of 3 to 9 tokens with 0 to 3 targets, by (epoch, index) alone."""

    def __init__(self, num_samples=40, batch_size=8, microbatch=8, rank=0, world_size=1):
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.microbatch = microbatch
        self.rank, self.world_size = rank, world_size
        self.seen: list[tuple[int, int]] = []

    def steps_in_epoch(self, epoch: int, sample_in_epoch: int = 0) -> int:
        return -(-(self.num_samples - sample_in_epoch) // self.batch_size)

    def steps(self, epoch: int, sample_in_epoch: int = 0) -> Iterator[Step]:
        order = np.random.default_rng(epoch).permutation(self.num_samples)
        for first in range(sample_in_epoch, self.num_samples, self.batch_size):
            members = order[first : first + self.batch_size]
            mine = members[self.rank :: self.world_size]
            self.seen += [(epoch, int(index)) for index in mine]
            samples = [self.sample(epoch, index) for index in mine]
            cuts = range(0, len(samples), self.microbatch)
            yield Step(
                [make_batch(samples[cut : cut + self.microbatch]) for cut in cuts],
                num_samples=len(members),
                epoch=epoch,
                sample_in_epoch=first + len(members),
            )

    def sample(self, epoch, index):
        rng = np.random.default_rng([epoch, index])
        length = int(rng.integers(3, 10))
        tokens = rng.integers(0, VOCAB, length)
        return tokens, rng.permutation(length)[: int(rng.integers(0, 4))]


class Recorder:
    """A logger that remembers."""

    def __init__(self):
        self.rows = []
        self.closed = False

    def log(self, metrics, progress):
        self.rows.append((progress.batch, dict(metrics)))

    def close(self):
        self.closed = True

    def values(self, name):
        return {batch: row[name] for batch, row in self.rows if name in row}

    @property
    def losses(self):
        return self.values("loss/train/total")


ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def make_config(**changes) -> TrainerConfig:
    values = {
        "max_duration": "10ba",
        "global_train_batch_size": 8,
        "eval_interval": "0ba",
        "save_interval": "4ba",
        "optimizer": {"lr": 1e-2, "weight_decay": 1e-3},
        "scheduler": {"t_warmup": "0.2dur"},
        "progress_bar": False,
    }
    return TrainerConfig(**{**values, **changes})


def make_trainer(
    *,
    model=None,
    loader=None,
    ranks=ALONE,
    monitors=(),
    evaluate=True,
    write_assets=None,
    **changes,
):
    """A trainer and its recorder."""
    recorder = Recorder()
    loader = loader or TinyLoader(rank=ranks.rank, world_size=ranks.world_size)
    # One sample in the last batch: of two ranks one has none.
    eval_loader = TinyLoader(25, 8, 3, ranks.rank, ranks.world_size)
    trainer = Trainer(
        model or TinyModel(),
        loader,
        {"eval": (eval_loader, MaskedLM)} if evaluate else {},
        config=make_config(**changes),
        ranks=ranks,
        loggers=[recorder],
        monitors=monitors,
        write_assets=write_assets,
    )
    return trainer, recorder


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def moments(trainer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value.clone()
        for name, p in trainer.model.named_parameters()
        for key, value in trainer.optimizer.state[p].items()
    }


def assert_same(one, other, **tolerance):
    """Bitwise equal, or close where a tolerance is given."""
    assert one.keys() == other.keys()
    for name in one:
        if tolerance:
            torch.testing.assert_close(one[name], other[name], **tolerance)
        else:
            assert torch.equal(one[name], other[name]), name
