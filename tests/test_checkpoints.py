"""States say what they mean: treated and untreated models load each other's, or refuse and say what to do."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.swa_utils import AveragedModel

from treatment_models import LAYERS, polar_reference, same
from wellcond.linalg import NewtonSchulz
from wellcond.nn import (
    DecorrelatedBatchNorm2d,
    GlobalCovariancePool2d,
    IterNorm2d,
    SkewOrthogonalConv2d,
    replace_batchnorm,
)
from wellcond.orthogonality import orthogonal_weight, spectral_norm, treat_like

EXTRA = "_extra_state"


def net(treatment: Callable[..., nn.Module] | None = None, **options) -> nn.Sequential:
    """A convolution before a norm with statistics of its own; a new one each time."""
    norm = DecorrelatedBatchNorm2d(6, momentum=1.0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 2, 3))
    if treatment is not None:
        treatment(model[0], **options)
        with torch.no_grad():
            model[0].parametrizations.weight.original.add_(torch.randn(6, 3, 3, 3))  # away from the start, as trained
    model(torch.randn(8, 3, 8, 8))
    return model


def outputs(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return model.eval()(torch.randn(4, 3, 8, 8, generator=generator)).detach()


def twice(layer: nn.Module) -> nn.Module:
    return spectral_norm(orthogonal_weight(layer))


# -- states of another meaning -------------------------------------------------------------------------------------

OTHERS = {
    "maps": (lambda: net(orthogonal_weight, map="householder"), lambda: net(orthogonal_weight), "map='householder'"),
    "treatments": (lambda: net(twice), lambda: net(orthogonal_weight), "'ow' .* and 'sn'"),
    "more of them": (lambda: net(orthogonal_weight), lambda: net(twice), "under 'ow' .*map='exp'.*, and is"),
    "norms": (lambda: net(spectral_norm, of="operator", input_size=8), lambda: net(spectral_norm), "of='operator'"),
    "sizes": (
        lambda: net(spectral_norm, of="operator", input_size=8),
        lambda: net(spectral_norm, of="operator", input_size=6),
        "input_size=8",
    ),
    "methods": (
        lambda: nn.Sequential(DecorrelatedBatchNorm2d(4)),
        lambda: nn.Sequential(DecorrelatedBatchNorm2d(4, method="cholesky")),
        "layer '0': the saved state is of method='zca'",
    ),
    "steps": (lambda: IterNorm2d(4, steps=3), lambda: IterNorm2d(4), "steps=3"),
    "iterated": (lambda: IterNorm2d(4), lambda: DecorrelatedBatchNorm2d(4), "steps=5"),
    "bounds": (lambda: SkewOrthogonalConv2d(3, 3, max_norm=1.0), lambda: SkewOrthogonalConv2d(3, 3), "max_norm=1.0"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", OTHERS)
def test_a_state_of_another_meaning_is_refused_and_changes_nothing(case: str, strict: bool) -> None:
    theirs, mine, message = OTHERS[case]
    model = mine()
    layer = next(m for m in model.modules() if EXTRA in m.state_dict() or is_parametrized(m))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(theirs().state_dict(), strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("case", OTHERS)
def test_of_an_older_version_which_did_not_say_it_loads_as_it_did(case: str) -> None:
    _, mine, _ = OTHERS[case]
    saved, model = mine(), mine()
    state = {name: value for name, value in saved.state_dict().items() if EXTRA not in name}
    assert len(state) < len(saved.state_dict())
    model.load_state_dict(state, strict=True)
    assert same(model, saved)


def test_options_that_change_nothing_of_the_meaning_are_not_asked() -> None:
    """A solver has an error and no meaning, ε belongs to the layer as that of batch norm, and so do all counters."""
    saved = DecorrelatedBatchNorm2d(4)
    for options in ({"solver": "svd"}, {"eps": 1e-3}, {"momentum": None}, {"relative": True}):
        DecorrelatedBatchNorm2d(4, **options).load_state_dict(saved.state_dict())
    iterated = DecorrelatedBatchNorm2d(4, solver=NewtonSchulz(5, tolerance=None))  # which is what an IterNorm is
    iterated.load_state_dict(IterNorm2d(4).state_dict())


def stored(state: dict[str, Tensor], how: str, folder: Path) -> dict[str, Tensor]:
    """The state after it went through something that people do with states."""
    if how == "safetensors":
        save_file(state, folder / "x.safetensors")
        return load_file(folder / "x.safetensors")
    if how == "torch.save":
        torch.save(state, buffer := io.BytesIO())
        buffer.seek(0)
        return torch.load(buffer, weights_only=True)
    if how == "distributed checkpoint":
        dcp.save(state, checkpoint_id=folder, no_dist=True)
        loaded = {name: torch.zeros_like(value) for name, value in state.items()}
        dcp.load(loaded, checkpoint_id=folder, no_dist=True)
        return loaded
    if how == "half precision":
        return {name: value.bfloat16() if value.is_floating_point() else value for name, value in state.items()}
    total = {name: value.clone() for name, value in state.items()}  # as in federated averaging
    for _ in range(2):
        for name, value in state.items():
            total[name] += value
    return {name: value / 3 for name, value in total.items()}


@pytest.mark.filterwarnings("ignore:.*was saved in torch.bfloat16", "ignore:.*world_size")
@pytest.mark.parametrize("how", ["safetensors", "torch.save", "distributed checkpoint", "half precision", "average"])
def test_what_a_state_says_outlives_everything_that_is_done_with_states(how: str, tmp_path: Path) -> None:
    saved = net(orthogonal_weight, map="cayley")
    state = stored(saved.state_dict(), how, tmp_path)
    model = net(orthogonal_weight, map="cayley")
    model.load_state_dict(state)
    if how != "half precision":
        torch.testing.assert_close(outputs(model), outputs(saved))
    with pytest.raises(RuntimeError, match="map='cayley'"):
        net(orthogonal_weight).load_state_dict(state)


def test_copies_and_pickles_say_the_same_and_a_functional_call_takes_the_state() -> None:
    saved = net(orthogonal_weight, map="cayley")
    for other in (copy.deepcopy(saved), pickle.loads(pickle.dumps(saved)), AveragedModel(saved).module):
        assert torch.equal(
            other.state_dict()[f"0.parametrizations.weight.0.{EXTRA}"],
            saved.state_dict()[f"0.parametrizations.weight.0.{EXTRA}"],
        )
    fresh = net(orthogonal_weight, map="cayley").eval()
    x = torch.randn(2, 3, 8, 8)
    state = {name: value for name, value in saved.state_dict().items() if EXTRA not in name}
    torch.testing.assert_close(torch.func.functional_call(fresh, state, x)[0, 0], saved.eval()(x)[0, 0])


def test_a_damaged_mark_is_said_to_be_so() -> None:
    state = DecorrelatedBatchNorm2d(4).state_dict()
    for damaged in (torch.full((5,), torch.nan), torch.tensor([50.0])):
        with pytest.raises(RuntimeError, match=r"the extra state is .*; leave it out"):
            DecorrelatedBatchNorm2d(4).load_state_dict({**state, EXTRA: damaged})
    # What is no tensor stands for one, as where torch.distributed.checkpoint finds none in an older file.
    for nothing in (None, b""):
        DecorrelatedBatchNorm2d(4).load_state_dict({**state, EXTRA: nothing})


# -- a plain state into a treated model ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv2d", "grouped", "transposed grouped", "embedding"])
def test_a_treated_layer_loads_a_plain_weight_as_if_it_were_treated_afterwards(kind: str) -> None:
    plain = LAYERS[kind]()
    for treated in (orthogonal_weight(LAYERS[kind]()), twice(LAYERS[kind]())):
        assert str(treated.load_state_dict(plain.state_dict(), strict=True)) == "<All keys matched successfully>"
        # The polar factor by NumPy in float64, rounded once or twice.
        torch.testing.assert_close(treated.weight.double(), polar_reference(plain, plain.weight), rtol=0, atol=2e-6)
        assert torch.equal(treated.parametrizations.weight.original, plain.weight)
    normed = spectral_norm(LAYERS[kind]())
    normed.load_state_dict(plain.state_dict())
    again = spectral_norm(copy.deepcopy(plain))
    assert torch.equal(normed.weight, again.weight)


def test_the_parameter_stays_that_of_the_optimizer_and_any_prefix_will_do() -> None:
    model, plain = net(orthogonal_weight), net()
    averaged = AveragedModel(model)
    held = averaged.module[0].parametrizations.weight.original
    averaged.load_state_dict(AveragedModel(plain).state_dict())
    assert averaged.module[0].parametrizations.weight.original is held
    assert torch.equal(held, plain[0].weight)
    assert not same(averaged.module, model)  # a copy loads by itself


def test_a_plain_weight_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    layer = orthogonal_weight(nn.Linear(4, 3))
    before = copy.deepcopy(layer.state_dict())
    broken = nn.Linear(4, 3)
    with torch.no_grad():
        broken.weight[1, 2] = torch.nan
    for state, message in (
        (nn.Linear(5, 3).state_dict(), r"saved shape is \(3, 5\), here it is \(3, 4\)"),
        (broken.state_dict(), "NaN"),
    ):
        with pytest.raises(RuntimeError, match=f"weight of layer '': .*{message}"):
            layer.load_state_dict({**state, "bias": before["bias"]})
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("treated", [True, False])
@pytest.mark.parametrize("treatment", [orthogonal_weight, spectral_norm])
def test_a_model_that_is_made_without_memory_is_loaded_by_assignment(treatment, treated: bool) -> None:
    """As ``from_pretrained`` and Lightning's ``init_module(empty_init=True)`` make models."""
    saved = net(treatment if treated else None)
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3))
        replace_batchnorm(model)
        treatment(model[0])
    model.load_state_dict(saved.state_dict(), assign=True)
    reference = saved if treated else nn.Sequential(treatment(saved[0]), *saved[1:])
    torch.testing.assert_close(outputs(model), outputs(reference))


# -- a treated state into a plain model ----------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("head", [DecorrelatedBatchNorm2d, GlobalCovariancePool2d])
def test_a_plain_model_refuses_a_treated_state_with_the_recipe(head, strict: bool) -> None:
    treated, plain = (nn.Sequential(nn.Conv2d(3, 6, 3), head(6)) for _ in range(2))
    orthogonal_weight(treated[0])
    with pytest.raises(RuntimeError, match=r"layer '0': its weight was treated when it was saved.*treat_like") as found:
        plain.load_state_dict(treated.state_dict(), strict=strict)
    assert str(found.value).count("treat_like") == 1
    plain.load_state_dict(treat_like(plain, treated.state_dict()))
    assert same(plain, treated)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "lightning.model.", "module._orig_mod."])
def test_whatever_stands_before_the_names_a_model_is_treated_as_the_state_was(prefix: str) -> None:
    saved = net(twice)
    state = {prefix + name: value for name, value in saved.state_dict().items()}
    model = net()
    held = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.load_state_dict(treat_like(model, {"n_averaged": torch.ones(()), **state} if prefix else state))
    assert torch.equal(outputs(model), outputs(saved))
    assert model[0].parametrizations.weight.original is held is optimizer.param_groups[0]["params"][0]
    model.load_state_dict(treat_like(model, state))  # treated alike already
    wrapped = nn.DataParallel(net())
    wrapped.load_state_dict(treat_like(wrapped, state))
    assert torch.equal(outputs(wrapped.module), outputs(saved))


def test_plain_states_and_compiled_parts_keep_their_names() -> None:
    plain, model = net(), net()
    model.load_state_dict(treat_like(model, {f"module.{name}": value for name, value in plain.state_dict().items()}))
    assert torch.equal(outputs(model), outputs(plain))
    saved = nn.Sequential(net(orthogonal_weight))
    compiled = nn.Sequential(torch.compile(net(), backend="eager"))
    compiled.load_state_dict(treat_like(compiled, saved.state_dict()))
    assert torch.equal(outputs(compiled[0]._orig_mod), outputs(saved[0]))


@pytest.mark.parametrize("treatment", [None, twice])
def test_a_compiled_model_inside_another_wrapper_is_found(treatment) -> None:
    saved = net(treatment)
    state = AveragedModel(torch.compile(saved, backend="eager")).state_dict()
    assert "module._orig_mod.0.bias" in state
    for model in (net(), net(twice) if treatment else net()):
        assert str(model.load_state_dict(treat_like(model, state))) == "<All keys matched successfully>"
        assert torch.equal(outputs(model), outputs(saved))
    averaged = AveragedModel(torch.compile(net(), backend="eager"))
    averaged.load_state_dict(treat_like(averaged, state))
    assert torch.equal(outputs(averaged.module._orig_mod), outputs(saved))
    parallel = nn.DataParallel(torch.compile(net(), backend="eager"))
    parallel.load_state_dict(treat_like(parallel, saved.state_dict()))
    assert torch.equal(outputs(parallel.module._orig_mod), outputs(saved))


def test_tensors_of_any_name_are_treated_alike() -> None:
    saved, fresh = (nn.LSTM(3, 4) for _ in range(2))
    orthogonal_weight(saved, "weight_hh_l0", map="cayley")
    fresh.load_state_dict(treat_like(fresh, saved.state_dict()))
    x = torch.randn(5, 2, 3)
    assert torch.equal(fresh(x)[0], saved(x)[0])


def test_what_no_state_can_tell_is_refused() -> None:
    state = net(orthogonal_weight).state_dict()
    older = {name: value for name, value in state.items() if EXTRA not in name}
    with pytest.raises(
        ValueError, match=r"layer '0': its weight was treated .* by an older version that did not save how"
    ):
        treat_like(net(), older)
    with pytest.raises(ValueError, match=r"saved under 'ow' \(map='exp'\), here it is under 'sn' \(of='weight'\)"):
        treat_like(net(spectral_norm), state)
    with pytest.raises(ValueError, match="no layer '0'"):
        treat_like(nn.ModuleDict({"conv": nn.Conv2d(3, 6, 3)}), state)
