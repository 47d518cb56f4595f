"""Running statistics recomputed for a finished model: of every norm, over the batches given, and of nothing else."""

from __future__ import annotations

import copy
from collections import UserDict

import pytest
import torch
from torch import nn

from helpers import relative_error
from wellcond.nn import DecorrelatedBatchNorm2d, update_statistics


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), DecorrelatedBatchNorm2d(6), nn.Dropout(0.5), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
    )


def batches(count: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [1 + 2 * torch.randn(8, 3, 6, 6) for _ in range(count)]


def test_the_statistics_are_the_average_of_those_of_the_batches():
    net, data = model().eval(), batches()
    assert update_statistics(net, data) == 2
    seen = [net[0](x).transpose(0, 1).flatten(1).detach().double() for x in data]
    cov = sum(torch.cov(features) for features in seen) / 3
    mean = sum(features.mean(1) for features in seen) / 3
    assert relative_error(net[1].running_cov[0], cov) < 1e-5 and relative_error(net[1].running_mean, mean) < 1e-5
    # Batch norm sees what the whitening by the batch gives, without dropout.
    white = [net[3](net[1].train()(net[0](x))).transpose(0, 1).flatten(1).detach() for x in data]
    assert relative_error(net[4].running_var, sum(features.var(1) for features in white) / 3) < 1e-4


@pytest.mark.parametrize("mode", [True, False])
def test_modes_and_momenta_are_as_before_and_evaluation_takes_the_new_statistics(mode):
    net = model().train(mode)
    net[2].train(not mode)
    before = {name: module.training for name, module in net.named_modules()}
    old = net[1].evaluation_whitening.clone()
    update_statistics(net, batches())
    assert {name: module.training for name, module in net.named_modules()} == before
    assert net[1].momentum == net[4].momentum == 0.1
    whitening = net[1].eval().evaluation_whitening
    assert not torch.equal(whitening, old)
    eye = torch.eye(6).expand_as(whitening)
    assert relative_error(whitening @ net[1].running_cov @ whitening, eye) < 1e-3  # ε


def test_averaged_weights_get_statistics_of_their_own():
    net, data = model(), batches(8)
    average = torch.optim.swa_utils.AveragedModel(net)
    for shift in (1.0, 3.0):
        with torch.no_grad():
            net[0].weight.mul_(shift)
        average.update_parameters(net)
    update_statistics(average, [(x, "label") for x in data])
    average.eval()
    y = average.module[1](average.module[0](torch.cat(data))).transpose(0, 1).flatten(1)
    assert relative_error(torch.cov(y), torch.eye(6)) < 0.1


def test_dictionaries_are_passed_by_keyword_and_models_without_norms_are_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = DecorrelatedBatchNorm2d(3)

        def forward(self, pixel_values, scale=1.0):
            return self.norm(pixel_values * scale)

    net, (x, *_) = Net(), batches()
    update_statistics(net, [{"pixel_values": x, "scale": 3.0}], device="cpu")
    cov = torch.cov(3 * x.transpose(0, 1).flatten(1))
    assert relative_error(net.norm.running_cov[0], cov) < 1e-5
    assert update_statistics(nn.Linear(2, 2), iter(())) == 0


def test_what_fails_leaves_the_statistics_as_they_were():
    net = model()
    net(batches()[0])
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="no batch"):
        update_statistics(net, [])
    with pytest.raises(ValueError, match="channels"):
        update_statistics(net[1], [batches()[0]])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training and net[1].momentum == 0.1 and net[1].training


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_batch_may_be_any_mapping(kind):
    """Those of HuggingFace's tokenizers and image processors are no dictionaries."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = DecorrelatedBatchNorm2d(3)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.norm(pixel_values)

    named, plain = Named(), nn.Sequential(DecorrelatedBatchNorm2d(3))
    assert update_statistics(named, [kind(pixel_values=x) for x in batches()]) == 1
    update_statistics(plain, batches())
    assert torch.equal(named.norm.running_cov, plain[0].running_cov)
