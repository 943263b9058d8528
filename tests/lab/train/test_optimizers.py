"""Schedules and averages against their closed forms."""

from __future__ import annotations

import sys

import pytest
import torch
from extras import need
from torch import nn

from ddit_rt.lab.train import OptimizerConfig
from ddit_rt.lab.train.optimizers import WeightAverage, build_optimizer, learning_rate_at


def test_cosine_schedule_by_hand() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=3)
    rates = [learning_rate_at(config, step, 11) for step in (0, 1, 2, 3, 7, 11)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.01 + 0.99 * 0.5, 0.01])


def test_constant_schedule_stays() -> None:
    config = OptimizerConfig(lr=2.0, warmup_steps=1, schedule="constant")
    assert [learning_rate_at(config, step, 4) for step in range(4)] == [1.0, 2.0, 2.0, 2.0]


def test_missing_prodigy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(ModuleNotFoundError, match=r"ddit_rt\[train\]"):
        build_optimizer(OptimizerConfig(name="prodigy"), [nn.Parameter(torch.ones(1))])


@pytest.mark.parametrize("name", ["adamw", "prodigy"])
def test_optimizer_descends(name: str) -> None:
    if name == "prodigy":
        need("prodigyopt")
    parameter = nn.Parameter(torch.ones(4))
    optimizer = build_optimizer(OptimizerConfig(name=name, lr=1.0), [parameter])
    for _ in range(3):
        optimizer.zero_grad()
        parameter.square().sum().backward()
        optimizer.step()
    assert float(parameter.detach().abs().max()) < 1


def test_average_by_hand() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    average = WeightAverage([parameter], decay=0.5)
    for value in (1.0, 2.0):
        parameter.data.fill_(value)
        average.update()
    # Decays 1/10 and 2/11: 0.9 after the first, then 0.9 * 2/11 + 2 * 9/11.
    expected = 0.9 * 2 / 11 + 2 * 9 / 11
    with average.applied():
        assert float(parameter.detach()) == pytest.approx(expected)
    assert float(parameter.detach()) == 2.0


def test_average_survives_its_state() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    average, again = (WeightAverage([parameter], decay=0.5) for _ in range(2))
    parameter.data.fill_(1.0)
    average.update()
    again.load_state_dict(average.state_dict())
    for one in (average, again):
        one.update()
    assert torch.equal(average.values[0], again.values[0])
