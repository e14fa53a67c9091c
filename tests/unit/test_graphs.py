"""CUDA graphs of microbatches, with a stand-in for CUDA: a replay calls what was recorded."""

import logging

import pytest
import torch
from torch import nn

from mosaicbert import run
from mosaicbert.batch import Batch, LossOutput
from mosaicbert.config.jobs import TrainerConfig
from mosaicbert.errors import ConfigError
from mosaicbert.train import graphs as graphs_module
from mosaicbert.train.backward import Backward, _wants_graphs
from mosaicbert.train.distributed import Ranks
from mosaicbert.train.graphs import MicrobatchGraphs

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class FakeCuda:
    """Records by leaving gradients as they were; replays by calling again."""

    def __init__(self, monkeypatch, run, params):
        self.run, self.params = run, params
        self.captures, self.replays, self.fails = 0, 0, False
        outer = self

        class Graph:
            def pool(self):
                return "pool"

            def replay(self):
                outer.replays += 1
                self.loss.copy_(outer.run(self.inputs, self.num_targets))

        class Capture:
            def __init__(self, graph, pool, capture_error_mode):
                assert pool in (None, "pool")

            def __enter__(self):
                if outer.fails:
                    raise RuntimeError("operation not permitted when stream is capturing")
                outer.captures += 1
                self.before = [None if p.grad is None else p.grad.clone() for p in outer.params]

            def __exit__(self, *_):
                for p, grad in zip(outer.params, self.before, strict=True):
                    assert (p.grad is None) == (grad is None), "a gradient came to be in a graph"
                    if grad is not None:
                        p.grad.copy_(grad)

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", Capture)


def batch(*ids):
    values = torch.tensor(ids)
    return Batch(values, values.float(), len(ids), len(ids), 1, 8)


def made(monkeypatch):
    torch.manual_seed(0)
    table, unused = nn.Parameter(torch.randn(10, 3)), nn.Parameter(torch.randn(2))

    def run(on, num_targets):
        loss = (table[on.input_ids].sum(1) * on.labels).sum() / num_targets
        loss.backward()
        return loss.detach()

    fake = FakeCuda(monkeypatch, run, [table, unused])
    graphs = MicrobatchGraphs(run, [table, unused], CPU)
    capture = graphs._capture

    def capturing(key, on):  # what the stand-in's graphs need to know
        captured = capture(key, on)
        if captured is not None:
            captured.graph.inputs, captured.graph.loss = captured.inputs, captured.loss
            captured.graph.num_targets = graphs._num_targets
            captured.inputs.input_ids = captured.inputs.input_ids.clone()
            captured.inputs.labels = captured.inputs.labels.clone()
        return captured

    monkeypatch.setattr(graphs, "_capture", capturing)
    return graphs, fake, table, unused, run


def test_gradients_are_those_of_plain_passes(monkeypatch):
    graphs, fake, table, unused, run = made(monkeypatch)
    steps = [
        [batch(1, 2, 3), batch(4, 5)],
        [batch(3, 2, 1), batch(7, 8)],
        [batch(9, 9, 9), batch(0, 1, 2), batch(2, 3)],
    ]
    for number, step in enumerate(steps):
        graphs.zero_grad()
        losses = [float(graphs(on, 2 + number)) for on in step]
        got = table.grad.clone()
        assert unused.grad is None
        table.grad = None
        wanted = [float(run(on, torch.tensor(2.0 + number))) for on in step]
        torch.testing.assert_close(got, table.grad)
        assert losses == pytest.approx(wanted)
        table.grad = None  # whoever takes it away: the graphs know theirs
    assert len(graphs) == fake.captures == 2
    assert fake.replays == 5


def test_beyond_the_limit_and_after_a_failure_kernels_are_launched(monkeypatch, caplog):
    graphs, fake, table, _, _ = made(monkeypatch)
    monkeypatch.setattr(graphs_module, "MAX_GRAPHS", 1)
    for on in [batch(1), batch(1), batch(1, 2), batch(1, 2)]:
        graphs.zero_grad()
        graphs(on, 1)
        assert table.grad is not None
    assert fake.captures == 1
    graphs, fake, table, _, _ = made(monkeypatch)
    fake.fails = True
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            graphs.zero_grad()
            assert float(graphs(batch(1, 2), 1)) == pytest.approx(
                float((table[1].sum() + 2 * table[2].sum()).detach())
            )
    assert len(graphs) == 0
    assert caplog.text.count("CUDA graphs are off") == 1
    assert "stream is capturing" in caplog.text


def config(**changes):
    return TrainerConfig.model_validate(
        {"max_duration": "1ba", "global_train_batch_size": 2} | changes
    )


def test_only_where_they_can_be():
    gpu = Ranks(0, 1, 0, GPU)
    assert _wants_graphs(config(), gpu)
    assert not _wants_graphs(config(compile=False), gpu)
    assert _wants_graphs(config(compile=False, cuda_graphs=True), gpu)
    assert not _wants_graphs(config(cuda_graphs=False), gpu)
    assert not _wants_graphs(config(), Ranks(0, 2, 0, GPU))
    assert not _wants_graphs(config(), Ranks(0, 1, 0, CPU))
    with pytest.raises(ConfigError, match="cuda_graphs: true needs a single GPU"):
        Backward(nn.Linear(1, 1), config(cuda_graphs=True), Ranks(0, 1, 0, CPU))


def test_padded_batches_without_compilation_run_as_graphs_too():
    gpu = Ranks(0, 1, 0, GPU)
    assert run.wants_graphs(config(compile=False), gpu, packed=False)
    assert not run.wants_graphs(config(compile=False), gpu, packed=True)
    assert run.wants_graphs(config(), gpu, packed=True)
    assert not run.wants_graphs(config(), Ranks(0, 2, 0, GPU), packed=False)
    assert not run.wants_graphs(config(), Ranks(0, 1, 0, CPU), packed=False)
    assert not run.wants_graphs(config(cuda_graphs=False), gpu, packed=True)


def test_memory_is_given_back_before_a_step_is_split(monkeypatch, caplog):
    """A step that runs out of memory is taken again without graphs, with the same gradients."""
    calls = []

    class Model(nn.Linear):
        def loss(self, batch, return_logits=False):
            calls.append(batch.num_samples)
            if len(calls) == 2:
                raise torch.OutOfMemoryError
            return LossOutput(self(batch.labels[:, None]).sum())

    model = Model(1, 1)
    backward = Backward(model, config(device_train_microbatch_size=2), Ranks(0, 1, 0, CPU))
    backward.graphs = MicrobatchGraphs(backward._take, model.parameters(), CPU)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    step = [batch(1, 2), batch(3, 4, 5)]
    with caplog.at_level(logging.WARNING):
        backward(step, 5, 7)
    assert backward.graphs is None
    assert len(calls) == 4  # one and a half, then both
    assert model.weight.grad.item() == pytest.approx(15 / 5)
    assert "Out of memory at batch 7 with CUDA graphs" in caplog.text
