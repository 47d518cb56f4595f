"""Nothing goes untreated in silence: wrapped optimizers, copies, replaced and tied weights, compiled parts."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured

from wellcond.monitor import ConditionMonitor
from wellcond.nn import DecorrelatedBatchNorm2d, fold, replace_batchnorm
from wellcond.orthogonality import NearestOrthogonalGradient, pre_spectral_layers, treat
from wellcond.orthogonality.callbacks import TreatmentInStages


class SharpnessAware(torch.optim.Optimizer):
    """Two phases a step, of which the second calls the base optimizer: the loop of SAM (Foret et al., ICLR 2021)."""

    def __init__(self, params, base, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for p in self._moving():
            self.state[p]["ascent"] = p.grad / p.grad.norm() * self.param_groups[0]["rho"]
            p.add_(self.state[p]["ascent"])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in self._moving():
            p.sub_(self.state[p]["ascent"])
        self.base_optimizer.step()
        self.zero_grad()

    def _moving(self):
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), DecorrelatedBatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 36, 3))


def backward(net: nn.Module) -> None:
    net(torch.randn(8, 3, 8, 8)).square().mean().backward()


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, count: int = 6) -> None:
    for _ in range(count):
        step(net, optimizer)


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    backward(net)
    optimizer.step()


@pytest.mark.filterwarnings("error")
def test_the_two_phases_of_sam_are_treated_in_the_step_that_moves():
    net = model()
    sam = SharpnessAware(net.parameters(), torch.optim.SGD, lr=0.1)
    treatment = treat(net, sam, "nog+olr")
    for _ in range(4):
        backward(net)
        sam.first_step()
        backward(net)
        start, gradient = net[0].weight.detach().clone(), net[0].weight.grad.clone()
        ascent = sam.state[net[0].weight]["ascent"]
        sam.second_step()
    assert treatment.nog.counts()["0"]["treated"] == 4
    # The last move is along the polar factor of the second gradient, from where the first phase began.
    U, _, Vh = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    moved = (start - ascent - net[0].weight.detach()).flatten(1) / treatment.rates()["0"].float()
    torch.testing.assert_close(moved, U @ Vh, rtol=0, atol=1e-4)


@pytest.mark.parametrize("how", ["copied together", "a new optimizer", "a new fused one", "pickled"])
@pytest.mark.parametrize("treatments", ["nog", "nog+ow"])
def test_a_treatment_that_no_optimizer_carries_is_missed_and_said(how, treatments):
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    treat(net, optimizer, treatments)
    step(net, optimizer)
    if how == "copied together":
        net, optimizer = copy.deepcopy((net, optimizer))
    elif how == "pickled":
        net, optimizer = pickle.loads(pickle.dumps((net, optimizer)))
    else:
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused="fused" in how)
    with pytest.warns(RuntimeWarning, match=r"nearest orthogonal gradient of layer '0' .* did not run in a step of"):
        steps(net, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(net, optimizer)  # once is enough


@pytest.mark.filterwarnings("error")
def test_what_is_treated_or_does_not_train_is_not_complained_of():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    treatment = treat(net, optimizer, "nog+olr+ow")
    average = torch.optim.swa_utils.AveragedModel(net)
    net2, optimizer2 = copy.deepcopy((net, optimizer))
    again = treat(net2, optimizer2, "nog")
    for _ in range(6):
        backward(net)  # two backward passes a step
        step(net, optimizer)
        average.update_parameters(net)
        step(net2, optimizer2)
    net.load_state_dict(
        {
            k: v if k.endswith("_extra_state") or not v.is_floating_point() else 2 * v
            for k, v in net.state_dict().items()
        },
        strict=True,
    )
    for _ in range(3):
        backward(net)  # gradients that no step uses
    again.remove()
    treatment.remove()
    for _ in range(6):
        step(net, optimizer)
        step(net2, optimizer2)
    assert set(net[0].__dict__) == set(nn.Conv2d(1, 1, 1).__dict__)


def test_a_replaced_weight_is_refused_in_the_next_step():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    treat(net, optimizer, "nog")
    step(net, optimizer)
    net.load_state_dict(net.state_dict(), assign=True)
    with pytest.raises(RuntimeError, match=r"layer '0' .*another weight.*assign=True.*build the optimizer again"):
        step(net, optimizer)


@pytest.mark.filterwarnings("error")
def test_weights_can_be_swapped_and_pruned_under_a_treatment():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    treatment = treat(net, optimizer, "nog")
    l1_unstructured(net[0], "weight", 0.1)
    step(net, optimizer)
    assert treatment.nog.counts()["0"]["treated"] == 1
    net = model()
    treat(net, torch.optim.SGD(net.parameters(), lr=0.1), "nog")
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        assert net.double()[0].weight.dtype == torch.float64
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.filterwarnings("error")
def test_many_ascents_in_a_step_are_no_alarm():
    net = model()
    sam = SharpnessAware(net.parameters(), torch.optim.SGD, lr=0.1)
    treatment = treat(net, sam, "nog")
    for _ in range(3):
        start = [p.detach().clone() for p in net.parameters()]
        for _ in range(4):
            backward(net)
            sam.first_step()
        backward(net)
        with torch.no_grad():
            for p, old in zip(net.parameters(), start, strict=True):
                p.copy_(old)
        sam.base_optimizer.step()
        sam.zero_grad()
    assert treatment.nog.counts()["0"]["treated"] == 3


def test_the_watch_keeps_nothing_alive():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    NearestOrthogonalGradient(optimizer, net[0])
    step(net, optimizer)
    weight = weakref.ref(net[0].weight)
    del net, optimizer
    gc.collect()
    assert weight() is None


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3)
        self.b.weight = self.a.weight
        self.norm = DecorrelatedBatchNorm2d(6)

    def forward(self, x):
        return self.norm(self.a(x)) + self.b(x)


@pytest.mark.parametrize("treatments", ["ow", "sn", "nog+ow"])
def test_a_tied_weight_is_not_untied(treatments):
    net = Tied()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"layer 'a' .*layer 'b' has the same weight.*'nog', 'olr'"):
        treat(net, optimizer, treatments, layers=["a"])
    assert net.a.weight is net.b.weight
    treat(net, optimizer, "nog", layers=["a"])
    step(net, optimizer)
    assert net.a.weight is net.b.weight


@pytest.mark.parametrize("treatments", ["ow", "sn", "nog+ow"])
def test_callbacks_do_not_untie_a_weight_either(treatments):
    net = Tied()
    for _ in range(2):  # nor at the second try
        with pytest.raises(ValueError, match=r"layer 'a' .*layer 'b' has the same weight.*'nog', 'olr'"):
            TreatmentInStages(treatments, layers=["a"]).treat_weights(net)
        assert net.a.weight is net.b.weight


def refused(which, norm):
    """A model and options for 'ow+sn' of its two layers, of which the second is refused; and what is said of it."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 6, 3), DecorrelatedBatchNorm2d(6))
    if which == "weight norm":
        nn.utils.parametrizations.weight_norm(net[2])
        return net, {}, "layer '2'.*remove a parametrisation such as weight norm first"
    if which == "NaN":
        nn.init.constant_(net[2].weight, float("nan"))
        return net, {}, "layer '2'.*NaN"
    return net, {"sn": {"of": "operators"}}, "unknown norm of the spectral norm 'operators'"


@pytest.mark.parametrize("which", ["weight norm", "NaN", "an option"])
def test_a_callback_treats_all_layers_or_none(which):
    net, options, message = refused(which, DecorrelatedBatchNorm2d(6))
    weight, before = net[0].weight, net[0].weight.detach().clone()
    callback = TreatmentInStages("ow+sn", layers=["0", "2"], options=options)
    for _ in range(2):  # which does not take it for done
        with pytest.raises(ValueError, match=message):
            callback.treat_weights(net)
        assert not nn.utils.parametrize.is_parametrized(net[0])
        assert net[0].weight is weight
        assert torch.equal(weight, before)
        assert callback.summary() == ""
        assert callback.put_on == {}


def test_the_steps_of_all_optimizers_are_treated_or_of_none():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), DecorrelatedBatchNorm2d(6))
    first, second = (torch.optim.SGD(net[i].parameters(), lr=0.1) for i in range(2))
    callback = TreatmentInStages("nog", layers=["0", "1"])
    with pytest.raises(ValueError, match="layer '0'"):
        callback.treat_steps(net, {first: ["0"], second: ["0"]})
    assert callback.handles == {}
    treat(net, first, "nog", layers=["0"]).remove()  # refused if it were on


class PartlyCompiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        net = nn.Sequential(nn.Conv2d(3, 6, 3), DecorrelatedBatchNorm2d(6))
        self.net = torch.compile(net, backend="eager")
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.net(x).mean((2, 3)))


def test_a_compiled_part_has_the_names_of_the_bare_model_everywhere():
    net = PartlyCompiled()
    assert list(pre_spectral_layers(net)) == ["net.0"]
    assert list(pre_spectral_layers(net, torch.randn(2, 3, 8, 8))) == ["net.0"]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for name in ("net.0", "net._orig_mod.0"):
        treatment = treat(net, optimizer, "nog+ow", layers=[name])
        assert list(treatment.layers) == ["net.0"]
        treatment.remove()
    treatment = treat(net, optimizer, "nog+ow+olr")
    with ConditionMonitor(net) as monitor:
        step(net, optimizer)
    assert list(treatment.rates()) == ["net.0"]
    assert list(monitor.statistics()) == ["net.1"]


@pytest.mark.parametrize("ran", [False, True])
def test_the_layers_of_a_compiled_model_are_found_by_running_it(ran):
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), DecorrelatedBatchNorm2d(6)
    )
    x = torch.randn(4, 3, 8, 8)
    compiled = torch.compile(net, backend="eager")
    if ran:  # compiled code that calls no new hooks
        compiled.eval()(x)
    assert list(pre_spectral_layers(compiled, x)) == ["3"]
    assert list(pre_spectral_layers(compiled, {"input": x})) == ["3"]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert list(treat(compiled, optimizer, "ow", example_input=x).layers) == ["3"]
    assert replace_batchnorm(compiled, example_input=x) == ["_orig_mod.1"]
    assert sum(isinstance(m, nn.Conv2d) for m in fold(compiled.eval(), x).modules()) == 2  # no convolution was put in


def test_compiled_parts_are_compiled_after_the_search_and_not_for_it():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    net = PartlyCompiled()
    net.head.forward = torch.compile(net.head.forward, backend=backend)
    x = torch.randn(4, 3, 8, 8)
    assert list(pre_spectral_layers(net, x)) == ["net.0"]
    assert graphs == []
    net(x)
    assert len(graphs) == 1
