"""treat() does all of it in one call, composes with everything around a training step, and can be undone."""

from __future__ import annotations

import copy
import importlib
import itertools
import pickle
import pkgutil

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from treatment_models import batches, orthogonality_gap, same, sgd, small_net, train
from wellcond.monitor import ConditionMonitor
from wellcond.nn import DecorrelatedBatchNorm2d
from wellcond.orthogonality import (
    TREATMENTS,
    NearestOrthogonalGradient,
    parse_treatments,
    pre_spectral_layers,
    treat,
    treat_like,
)

ALL = ["+".join(c) for n in range(1, 6) for c in itertools.combinations(TREATMENTS, n)]
"""All 31 combinations: among them every one of the paper's Tables 2-5."""


def net(seed: int = 0, **kwargs) -> nn.Sequential:
    torch.manual_seed(seed)
    return small_net(**kwargs)


# Names -----------------------------------------------------------------------------------------------------------


def test_names_are_read_as_the_papers_tables_write_them():
    assert tuple(TREATMENTS) == ("sn", "ol", "ow", "nog", "olr")
    assert parse_treatments("NOG + OW+olr") == ("nog", "ow", "olr")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("nog+owl", r"unknown treatment 'owl' in 'nog\+owl'; did you mean 'ow'"),
        ("ngo", "unknown treatment 'ngo' in 'ngo'; did you mean 'nog'"),
        ("xyz", "unknown treatment 'xyz' in 'xyz' \\(known: sn, ol, ow, nog, olr"),
        ("", "unknown treatment '' in ''"),
        ("nog+", r"unknown treatment '' in 'nog\+'"),
        ("nog+ow+NOG", "treatment 'nog' is named twice"),
    ],
)
def test_wrong_names_get_the_nearest_right_one(names, message):
    with pytest.raises(ValueError, match=message):
        parse_treatments(names)
    model = net()
    with pytest.raises(ValueError, match=message):
        treat(model, sgd(model), names)


def test_a_list_of_names_is_refused():
    with pytest.raises(TypeError, match="one string such as"):
        parse_treatments(["nog"])  # type: ignore[arg-type]


# Every combination -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ALL)
def test_every_combination_trains_and_is_undone(names):
    model = net()
    optimizer = sgd(model)
    parameters, order = dict(model.named_parameters()), list(model.state_dict())
    treatment = treat(model, optimizer, names)
    data = batches(3)
    train(model, optimizer, data, treatment.loss)
    assert all(p.isfinite().all() for p in model.parameters())
    if "ow" in names:
        assert orthogonality_gap(model[0]) < 1e-5
    if "sn" in names:
        assert torch.linalg.matrix_norm(model[0].weight.detach().flatten(1), 2) == pytest.approx(1, abs=1e-5)
    weight = model[0].weight.detach().clone()
    treatment.remove()
    treatment.remove()
    # The layer keeps the weight in use, in the same parameter of the same class under the same name and in its place.
    assert type(model[0]) is nn.Conv2d
    assert torch.equal(model[0].weight, weight)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == order
    assert treatment.loss().item() == 0
    twin = copy.deepcopy(model)
    plain = sgd(twin)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, data)
    train(twin, plain, data)
    assert same(model, twin)


@pytest.mark.parametrize("names", ["ow", "sn", "ow+sn"])
def test_weights_loaded_by_assignment_are_those_that_stay_when_it_is_removed(names):
    """Loading with assign=True makes every parameter a new tensor, as does a move to another kind of device."""
    model, saved = net(), net(seed=1)
    treatment = treat(model, sgd(model), names)
    treat(saved, sgd(saved), names)
    model.load_state_dict(saved.state_dict(), assign=True)
    model.eval()
    in_use = model[0].weight.detach().clone()
    treatment.remove()
    assert torch.equal(model[0].weight, in_use)


def test_all_at_once_equals_one_after_another():
    models = []
    for calls in (["nog+ow+olr"], ["ow", "nog", "olr"]):
        model = net()
        optimizer = sgd(model)
        for names in calls:
            treat(model, optimizer, names)
        train(model, optimizer, batches(3))
        models.append(model)
    assert same(*models)


def test_only_the_layer_before_the_spectral_layer_is_treated():
    model = net()
    optimizer = sgd(model)
    treatment = treat(model, optimizer, "nog+ow+olr")
    assert list(treatment.layers) == ["0"]
    assert type(model[3]) is nn.Conv2d
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(list(model.parameters()))]


def test_nog_and_olr_act_on_the_stored_tensor_of_an_orthogonal_weight():
    """The step of the stored tensor is the rate times an orthogonal matrix, as the optimizer here is plain SGD."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    treatment = treat(model, optimizer, "nog+ow+olr", options={"nog": {"scale": "paper"}})
    stored = model[0].parametrizations.weight.original
    rates = []
    for data in batches(4):
        before = stored.detach().clone()
        train(model, optimizer, [data])
        rates.append(treatment.rates()["0"].item())
        step = (before - stored.detach()).flatten(1) / rates[-1]
        # The step is read from weights of size 1: an error of eps/rate.
        assert torch.linalg.svdvals(step)[:-1] == pytest.approx([1] * 7, abs=1e-6 / rates[-1])
    assert all(0 < rate <= 0.1 for rate in rates)


def test_layers_may_be_named_or_given():
    model = net()
    for layers, names in (("3", ["3"]), (model[3], ["3"]), (["0", model[3]], ["0", "3"]), (None, ["0"])):
        treatment = treat(model, sgd(model), "nog+ow", layers=layers)
        assert list(treatment.layers) == names
        treatment.remove()


def test_an_example_input_is_passed_on():
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(torch.stack([x[i] for i in range(len(x))]))

    model = Untraceable()
    with pytest.raises(ValueError, match="give an example_input"):
        treat(model, sgd(model), "nog")
    assert list(treat(model, sgd(model), "nog", example_input=batches(1)[0][0]).layers) == ["net.0"]


def test_options_reach_their_treatment():
    model = net()
    options = {
        "nog": {"scale": "rms"},
        "olr": {"rule": "exact", "direction": "update"},
        "ol": {"form": "srip", "coefficient": 0.5},
        "ow": {"map": "cayley"},
    }
    treatment = treat(model, sgd(model), "nog+olr+ol+ow", options=options)
    assert treatment.nog is not None
    assert treatment.olr is not None
    assert treatment.ol is not None
    assert treatment.nog.scale == "rms"
    assert (treatment.olr.rule, treatment.olr.direction) == ("exact", "update")
    assert (treatment.ol.form, treatment.ol.coefficient) == ("srip", 0.5)
    assert model[0].parametrizations.weight[0].map == "cayley"
    with pytest.raises(ValueError, match="unknown treatment 'olr' in options"):
        treat(model, sgd(model), "nog", options=options)


def test_the_loss_is_the_orthogonal_loss_and_otherwise_zero():
    model = net()
    W = model[0].weight.detach().flatten(1)
    treatment = treat(model, sgd(model), "ol")
    assert treatment.loss().item() == pytest.approx(torch.dist(W @ W.T, torch.eye(8)).item(), rel=1e-5)
    treatment.remove()
    assert treat(model, sgd(model), "nog").loss().item() == 0


def test_the_summary_says_what_acts_where():
    model = net(groups=1)
    treatment = treat(model, sgd(model), "olr+ow+nog", options={"olr": {"rule": "exact"}})
    lines = treatment.summary().splitlines()
    assert lines[0].split() == ["layer", "weight", "matrix", "treatments"]
    assert lines[2].startswith("0 ")
    assert "8 × 3 × 3 × 3" in lines[2]
    assert "8 × 27" in lines[2]
    assert lines[2].endswith("ow, nog, olr (rule=exact)")
    assert repr(treatment) == "Treatment(ow+nog+olr on 0)"
    treatment.remove()
    assert treatment.summary().splitlines()[2].endswith("removed")


# Resume, copies, files -------------------------------------------------------------------------------------------


def test_the_state_of_other_treatments_is_refused():
    a, b = net(), net()
    treatment = treat(a, sgd(a), "nog")
    with pytest.raises(ValueError, match=r"of the treatments \['nog'\], this model has \['nog', 'olr'\]"):
        treat(b, sgd(b), "nog+olr").load_state_dict(treatment.state_dict())
    c = net()
    with pytest.raises(ValueError, match=r"of the layers \['0'\], this model has \['3'\]"):
        treat(c, sgd(c), "nog", layers="3").load_state_dict(treatment.state_dict())


@pytest.mark.parametrize("names", ["nog+olr+ol", "nog+ow+olr", "sn"])
def test_copies_of_a_treated_model_are_whole_and_outlive_its_removal(names):
    model = net()
    optimizer = sgd(model)
    treatment = treat(model, optimizer, names)
    train(model, optimizer, batches(2))
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    assert all(same(model, twin) for twin in copies)
    train(model, optimizer, batches(2, seed=1))
    ema.update_parameters(model)
    x = batches(1)[0][0]
    expected = [twin.eval()(x) for twin in copies]
    average = ema.module.eval()(x)
    treatment.remove()
    assert all(torch.equal(twin(x), y) for twin, y in zip(copies, expected, strict=True))
    assert torch.equal(ema.module(x), average)
    if "ow" in names:
        assert all(orthogonality_gap(twin[0]) < 1e-5 for twin in (*copies, ema.module))
    again = copies[0]  # the copy can be treated by itself
    if "ow" not in names and "sn" not in names:
        treat(again, sgd(again), names)


# Around the step -------------------------------------------------------------------------------------------------


def test_autocast_trains_with_everything_on():
    model = net()
    optimizer = sgd(model)
    treatment = treat(model, optimizer, "nog+ow+olr+ol", options={"nog": {"scale": "paper"}})
    for x, y in batches(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y) + treatment.loss()
        loss.backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):  # a step inside the block must not be rounded either
            optimizer.step()
    assert orthogonality_gap(model[0]) < 1e-5
    W = model[0].parametrizations.weight.original.grad.flatten(1)
    assert torch.linalg.svdvals(W)[:-1] == pytest.approx([1] * 7, abs=1e-5)


# Refusals --------------------------------------------------------------------------------------------------------


def test_the_same_treatment_twice_is_refused():
    for name in TREATMENTS:
        model = net()
        optimizer = sgd(model)
        first = treat(model, optimizer, name)
        with pytest.raises(ValueError, match=r"layer '0' .*(already on|already has the parametrisation)"):
            treat(model, optimizer, name)
        first.remove()
        treat(model, optimizer, name)


@pytest.mark.parametrize("names", ["nog", "olr", "ow", "sn", "ol", "nog+ow+olr"])
def test_a_weight_the_optimizer_does_not_hold_is_refused(names):
    model = net()
    optimizer = torch.optim.SGD(model[3].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"layer '0' \(Conv2d\): the optimizer does not hold its weight; add it"):
        treat(model, optimizer, names)


def bad_layer_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), DecorrelatedBatchNorm2d(4))


@pytest.mark.parametrize(
    ("make", "names", "layers", "optimizer", "message"),
    [
        (bad_layer_model, "nog", "1", torch.optim.SGD, r"layer '1' \(BatchNorm2d\) has a weight of shape \(4,\)"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm([3, 4])),
            "nog",
            "1",
            torch.optim.SGD,
            r"layer '1' \(LayerNorm\) has a weight of shape \(3, 4\), which is not a matrix",
        ),
        (bad_layer_model, "nog", "conv", torch.optim.SGD, "Sequential.* has no layer 'conv'"),
        (bad_layer_model, "nog", [nn.Linear(2, 2)], torch.optim.SGD, "is not a part of the model .Sequential"),
        (bad_layer_model, "nog", [], torch.optim.SGD, "layers is empty"),
        (lambda: nn.Linear(3, 3), "nog", None, torch.optim.SGD, "no spectral layer; put one in"),
        (small_net, "ow+nog+olr", None, torch.optim.Rprop, r"layer '0' \(Conv2d\): the update direction of Rprop"),
        (small_net, "ow+nog+olr", ["0", "0"], torch.optim.Adafactor, "update direction of Adafactor"),
    ],
)
def test_bad_input_changes_nothing(make, names, layers, optimizer, message):
    model = make()
    before, classes = copy.deepcopy(model), [type(m) for m in model.modules()]
    stepper = optimizer(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        treat(model, stepper, names, layers=layers)
    assert same(model, before)
    assert [type(m) for m in model.modules()] == classes
    assert not stepper._optimizer_step_pre_hooks
    assert not stepper._optimizer_step_post_hooks


def test_a_bad_option_undoes_what_was_done_before_it():
    model = net()
    before, optimizer = copy.deepcopy(model), sgd(model)
    with pytest.raises(ValueError, match="rule of the optimal learning rate"):
        treat(model, optimizer, "ow+ol+nog+olr", options={"olr": {"rule": "best"}})
    assert same(model, before)
    assert type(model[0]) is nn.Conv2d
    assert not optimizer._optimizer_step_pre_hooks
    treat(model, optimizer, "ow+ol+nog+olr")


def test_an_attached_treatment_and_treat_see_each_other():
    model = net()
    optimizer = sgd(model)
    NearestOrthogonalGradient(optimizer, model[0])
    with pytest.raises(ValueError, match="already on"):
        treat(model, optimizer, "nog")


def test_a_state_keeps_the_numbers_of_its_time():
    """As a checkpoint in memory does, which many a training loop keeps of its best epoch."""
    model = net()
    optimizer = sgd(model)
    treatment = treat(model, optimizer, "nog+olr")
    train(model, optimizer, batches(2))
    state = treatment.state_dict()
    then = copy.deepcopy(state)
    train(model, optimizer, batches(3))
    assert str(state) == str(then)
    assert int(state["nog"]["counts"]["0"].sum()) == 2
    treatment.load_state_dict(state)
    train(model, optimizer, batches(1))
    assert str(state) == str(then)
    assert treatment.nog.counts()["0"]["treated"] == 3


def test_a_state_saved_inside_a_wrapper_loads_without_it():
    model, bare = (nn.Sequential(nn.Conv2d(3, 4, 3), DecorrelatedBatchNorm2d(4)) for _ in range(2))
    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))
    inside = treat(wrapped, torch.optim.SGD(wrapped.parameters(), 0.1), "nog+olr", layers=[model[0]])
    outside = treat(bare, torch.optim.SGD(bare.parameters(), 0.1), "nog+olr")
    assert list(inside.layers) == list(outside.layers) == ["0"]
    outside.load_state_dict(inside.state_dict())


def test_a_state_saved_with_one_layer_compiled_loads_without_it():
    model, bare = net(), net()
    treatment = treat(bare, sgd(bare), "nog")
    model[0] = torch.compile(model[0], backend="eager")
    compiled = treat(model, sgd(model), "nog", layers=model[0]._orig_mod)
    assert list(compiled.layers) == ["0"]
    treatment.load_state_dict(compiled.state_dict())


@pytest.mark.parametrize("name", ["orthogonality", "monitor", "lightning", "transformers"])
def test_no_module_hides_behind_a_public_name(name):
    package = importlib.import_module(f"wellcond.{name}")
    assert not {module.name for module in pkgutil.iter_modules(package.__path__)} & {*package.__all__}


class Twice(nn.Module):
    """A parametrisation of a user's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("treatments", ["ow", "sn", "ow+sn+nog"])
def test_a_foreign_parametrisation_on_top_is_named_and_can_be_taken_off(treatments) -> None:
    model = small_net()
    optimizer = sgd(model)
    weight, x = model[0].weight, batches(1)[0][0]
    treatment = treat(model, optimizer, treatments)
    parametrize.register_parametrization(model[0], "weight", Twice())
    train(model, optimizer, batches(2))
    in_use = model[0].weight.detach().clone()
    with pytest.raises(
        RuntimeError, match=r"layer '0' \(Conv2d\) got the parametrisation Twice since.*then call remove"
    ):
        treatment.remove()
    assert torch.equal(model[0].weight, in_use)
    parametrize.remove_parametrizations(model[0], "weight")
    expected = model(x)
    treatment.remove()
    assert type(model[0]) is nn.Conv2d and model[0].weight is weight
    assert torch.equal(weight, in_use) and torch.equal(model(x), expected)


def test_a_layer_that_computes_its_output_itself_goes_back_also_from_under_another_parametrisation() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), DecorrelatedBatchNorm2d(4))
    before, x = copy.deepcopy(model), torch.randn(8, 4, 6, 6)
    treatment = treat(model, sgd(model), "ow", options={"ow": {"map": "soc"}})
    parametrize.register_parametrization(model[0], "weight", Twice())
    treatment.remove()
    assert same(model, before) and torch.equal(model(x), before(x))


def shared() -> nn.Sequential:
    """A layer and a norm that are called twice, under two names each."""
    torch.manual_seed(0)
    layer, norm = nn.Conv2d(4, 4, 3, padding=1), DecorrelatedBatchNorm2d(4)
    return nn.Sequential(layer, norm, nn.ReLU(), layer, norm)


def test_a_module_with_several_names_is_found_by_any_and_called_by_the_first() -> None:
    model = shared()
    for names in (["3"], ["0", "3"]):
        treatment = treat(model, sgd(model), "nog", layers=names)
        assert list(treatment.layers) == ["0"]
        treatment.remove()
    assert list(pre_spectral_layers(model, of="4")) == ["0"]
    with ConditionMonitor(model, layers=["4"]) as monitor:
        assert list(monitor.layers) == ["1"]
    with pytest.raises(ValueError, match="no layer '5'"):
        treat(model, sgd(model), "nog", layers=["5"])


def test_a_state_of_a_treated_module_with_several_names_treats_it_once() -> None:
    model, fresh = shared(), shared()
    treat(model, sgd(model), "ow")
    fresh.load_state_dict(treat_like(fresh, model.state_dict()))
    assert len(fresh[0].parametrizations.weight) == 1
    assert torch.equal(fresh[3].weight, model[0].weight)
