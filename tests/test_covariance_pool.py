"""Global covariance pooling: the head's numbers are those of the definition, and any backbone can carry it."""

import copy

import pytest
import torch
from torch import nn

from wellcond.linalg import NewtonSchulz, covariance
from wellcond.nn import (
    GlobalCovariancePool1d,
    GlobalCovariancePool2d,
    GlobalCovariancePool3d,
    SpectralLayer,
    TokenCovariancePool,
)
from wellcond.orthogonality import pre_spectral_layers


def test_vector_output_is_the_upper_triangle():
    x = torch.randn(3, 5, 4, 4)
    Q = GlobalCovariancePool2d(5, triu=False)(x)
    pool = GlobalCovariancePool2d(5)
    v = pool(x)
    assert v.shape == (3, pool.out_features) == (3, 15)
    rows, columns = torch.triu_indices(5, 5)
    torch.testing.assert_close(v, Q[:, rows, columns])


def test_reduction_comes_before_the_covariance():
    pool = GlobalCovariancePool2d(12, reduction=4)
    x = torch.randn(6, 12, 3, 3)
    reduced = pool.reduction(x)
    assert reduced.shape == (6, 4, 3, 3)
    assert reduced.min() >= 0
    assert pool(x).shape == (6, pool.out_features) == (6, 10)


FULL_RANK, RANK_DEFICIENT = (2, 3, 3, 3), (2, 5, 2, 2)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        *(({"solver": NewtonSchulz(k, tolerance=None)}, s) for k in range(1, 8) for s in (FULL_RANK, RANK_DEFICIENT)),
        ({}, FULL_RANK),
        ({}, RANK_DEFICIENT),
        ({"solver": "eigh"}, FULL_RANK),  # at rank deficiency P^{1/2} has no derivative; the factor form has
        ({"normalisation": "trace"}, FULL_RANK),
        ({"normalisation": "trace", "isometric": True}, RANK_DEFICIENT),
        ({"normalisation": "frobenius"}, FULL_RANK),
        ({"normalisation": "frobenius"}, RANK_DEFICIENT),
        ({"function": "log", "eps": 1e-2}, FULL_RANK),
        ({"function": "log", "eps": 1e-2}, RANK_DEFICIENT),
        ({"function": "power", "exponent": 0.3}, FULL_RANK),
        ({"function": "power", "exponent": 0.3}, RANK_DEFICIENT),
        ({"function": "power", "exponent": -0.7, "eps": 1e-2}, RANK_DEFICIENT),
        ({"function": "invsqrt", "eps": 1e-2, "normalisation": "trace"}, RANK_DEFICIENT),
        ({"function": "exp"}, RANK_DEFICIENT),
    ],
    ids=str,
)
def test_gradients_match_finite_differences(options, shape):
    pool = GlobalCovariancePool2d(shape[1], **options).double()
    assert torch.autograd.gradcheck(pool, torch.randn(shape, dtype=torch.float64, requires_grad=True))


FUNCTIONS = {
    "sqrt": torch.sqrt,
    "invsqrt": torch.rsqrt,
    "log": torch.log,
    "power": lambda x: x**0.3,
    "exp": torch.exp,
}


@pytest.mark.parametrize("shape", [(2, 5, 4, 4), (2, 9, 2, 3), (2, 1, 2, 2)])
@pytest.mark.parametrize("normalisation", [None, "trace", "frobenius"])
@pytest.mark.parametrize("eps", [0.0, 1e-2])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_values_are_those_of_the_singular_values_of_the_features(function, eps, normalisation, shape):
    """f(σ²/c + ε) from torch's SVD of the centred features, with c = Σσ² or (Σσ⁴)^{1/2}."""
    d, n = shape[1], shape[2] * shape[3]
    if eps == 0.0 and (function in ("invsqrt", "log") and n <= d):
        eps = 1e-1  # these two do not exist at rank deficiency
    x = torch.randn(shape, dtype=torch.float64)
    options = {"exponent": 0.3} if function == "power" else {}
    pool = GlobalCovariancePool2d(d, function=function, triu=False, eps=eps, normalisation=normalisation, **options)
    X = x.flatten(2)
    U, sigma, _ = torch.linalg.svd((X - X.mean(-1, keepdim=True)) / n**0.5)
    eigvals = torch.nn.functional.pad(sigma.square(), (0, d - sigma.shape[-1]))
    rank = min(d, n - 1)
    eigvals[:, rank:] = 0
    size = {None: torch.ones(2, 1), "trace": eigvals.sum(-1, keepdim=True), "frobenius": eigvals.norm(dim=-1)[:, None]}
    expected = (U * FUNCTIONS[function](eigvals / size[normalisation] + eps).unsqueeze(-2)) @ U.mT
    # The worst conditioned is the inverse root of full rank here: κ^{3/2} eps64 of its size, κ < 1e4.
    torch.testing.assert_close(pool(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("normalisation", ["trace", "frobenius"])
@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e18])
def test_normalised_heads_do_not_see_the_scale_of_the_features(normalisation, scale):
    x = torch.randn(2, 6, 3, 3)
    pool = GlobalCovariancePool2d(6, normalisation=normalisation)
    # Scaling rounds every entry once more.
    torch.testing.assert_close(pool(scale * x), pool(x), rtol=0, atol=10 * torch.finfo(x.dtype).eps)


def test_a_power_of_rank_deficient_float32_features_has_no_rounding_noise_in_the_null_space():
    x = torch.randn(2, 32, 3, 3)
    pool = GlobalCovariancePool2d(32, function="power", exponent=0.25, triu=False)
    Q, truth = pool(x), pool(x.double())
    assert torch.linalg.matrix_rank(truth, hermitian=True).tolist() == [8, 8]
    # The features are exact here, so only the result is rounded; through a float32 P it would be eps32^0.25 = 2e-2.
    assert (Q.double() - truth).abs().max() < 10 * torch.finfo(x.dtype).eps * truth.abs().max()


def test_isometric_vectors_have_the_inner_products_of_the_matrices():
    x = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    v = GlobalCovariancePool2d(6, isometric=True).double()(x)
    Q = GlobalCovariancePool2d(6, triu=False)(x).flatten(1)
    # Sums of 21 and of 36 products, all of the same sign on the diagonal and no larger off it.
    atol = 36 * torch.finfo(x.dtype).eps * (Q @ Q.T).max().item()
    torch.testing.assert_close(v @ v.T, Q @ Q.T, rtol=0, atol=atol)


@pytest.mark.parametrize("options", [{}, {"normalisation": "trace", "isometric": True}, {"reduction": 3}])
def test_tokens_are_pooled_as_the_positions_of_a_map(options):
    x = torch.randn(2, 7, 4, 3)
    tokens, grid = TokenCovariancePool(7, **options), GlobalCovariancePool2d(7, **options)
    if "reduction" in options:
        grid.reduction = torch.nn.Conv2d(7, 3, 1, bias=False)
        with torch.no_grad():
            grid.reduction.weight.copy_(tokens.reduction.weight[:, :, None, None])
    torch.testing.assert_close(tokens(x.flatten(2).transpose(1, 2)), grid(x), rtol=1e-4, atol=1e-5)
    assert tokens.out_features == grid.out_features


@pytest.mark.parametrize(
    "options", [{}, {"function": "log", "eps": 1e-3, "isometric": True}, {"reduction": 3}], ids=str
)
@pytest.mark.parametrize(
    ("layer", "shape"), [(GlobalCovariancePool1d, (4, 7, 12)), (GlobalCovariancePool3d, (4, 7, 2, 3, 2))], ids=str
)
def test_signals_and_clips_are_pooled_as_the_positions_of_a_map(layer, shape, options):
    """Values, gradients, the running statistics of the reduction, and the state dict but for the kernel's shape."""
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    pool = layer(7, **options, dtype=torch.float64)
    grid = GlobalCovariancePool2d(7, **options, dtype=torch.float64)
    state = pool.state_dict()
    grid.load_state_dict({k: v.flatten(2).unsqueeze(3) if v.ndim > 2 else v for k, v in state.items()})
    y, expected = pool(x), grid(x.flatten(2).reshape(4, 7, 4, 3))
    torch.testing.assert_close(y, expected)
    w = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad((out * w).sum(), x)[0] for out in (y, expected)))
    assert pool.out_features == grid.out_features == y.shape[1]
    if "reduction" in options:
        torch.testing.assert_close(pool.reduction[1].running_var, grid.reduction[1].running_var)
        assert list(pre_spectral_layers(nn.Sequential(pool))) == ["0.reduction.0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"function": "log", "eps": 1e-3}, {"normalisation": "frobenius"}], ids=str)
def test_half_precision_input_is_pooled_in_float32(dtype, options):
    x = torch.randn(2, 6, 4, 4).to(dtype)
    pool = GlobalCovariancePool2d(6, **options)
    y, expected = pool(x), pool(x.float())
    assert y.dtype == dtype
    # Only the result is rounded to half precision.
    assert (y.float() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("options", [{}, {"function": "power", "exponent": 0.4}, {"normalisation": "trace"}], ids=str)
def test_autocast_does_not_reach_the_spectral_work(options):
    x = torch.randn(2, 6, 4, 4, requires_grad=True)
    pool = GlobalCovariancePool2d(6, **options)
    with torch.autocast("cpu", torch.bfloat16):
        inside = pool(x)
    outside = pool(x)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (inside, outside)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"solver": NewtonSchulz(5, tolerance=None)}, {"function": "power"}, {"normalisation": "frobenius"}],
    ids=str,
)
def test_no_matrix_of_the_size_of_the_map_is_formed(options):
    """A 250 × 100 map has 25,000 positions: a centring matrix would be 625 million numbers."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
            return out

    x = torch.randn(2, 8, 250, 100, requires_grad=True)
    with Watch():
        GlobalCovariancePool2d(8, **options)(x).sum().backward()
    assert max(sizes) <= x.numel()


@pytest.mark.parametrize(
    "options",
    [{}, {"function": "power"}, {"normalisation": "trace"}, {"normalisation": "frobenius", "isometric": True}],
    ids=str,
)
@pytest.mark.parametrize("value", [1.0, 0.1, 7.7])
def test_a_constant_map_pools_to_zero_with_a_finite_gradient(options, value):
    """The mean of 49 times 0.1 is not 0.1; what is left is no map that could be normalised."""
    x = torch.full((2, 4, 7, 7), value, requires_grad=True)
    y = GlobalCovariancePool2d(4, **options)(x)
    y.sum().backward()
    assert y.abs().max() == 0
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    "backbone",
    [
        lambda: nn.Conv2d(3, 8, 3),
        lambda: nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(inplace=True), nn.Conv2d(4, 8, 1), nn.ReLU()),
    ],
)
@pytest.mark.parametrize("size", [(9, 9), (7, 12), (40, 40)])
def test_any_backbone_and_size_of_image_can_carry_the_head(backbone, size):
    head = GlobalCovariancePool2d(8, reduction=4, normalisation="trace")
    model = nn.Sequential(backbone(), head, nn.Linear(head.out_features, 5))
    assert list(pre_spectral_layers(model)) == ["1.reduction.0"]
    loss = nn.functional.cross_entropy(model(torch.randn(3, 3, *size)), torch.tensor([0, 1, 2]))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (GlobalCovariancePool2d, (2, 4, 3), r"expected 4D input \(got 3D input\)"),
        (GlobalCovariancePool2d, (2, 5, 3, 3), r"expected input with 4 channels \(got 5 channels\)"),
        (GlobalCovariancePool1d, (2, 4, 3, 3), r"expected 3D input \(got 4D input\)"),
        (GlobalCovariancePool3d, (2, 4, 3, 3), r"expected 5D input \(got 4D input\)"),
        (GlobalCovariancePool3d, (2, 5, 3, 3, 3), r"expected input with 4 channels \(got 5 channels\)"),
        (TokenCovariancePool, (2, 4), r"expected 3D input \(got 2D input\)"),
        (TokenCovariancePool, (2, 4, 5), r"expected tokens with 4 features \(got 5 features\)"),
    ],
)
def test_input_of_the_wrong_form_is_refused(layer, shape, message):
    with pytest.raises(ValueError, match=message):
        layer(4)(torch.randn(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"function": "sqrtt"}, "did you mean 'sqrt'"),
        ({"function": "sqrt", "exponent": 0.3}, "exponent=0.3 is for function='power'"),
        ({"function": "power", "exponent": float("nan")}, "finite"),
        ({"function": "log", "solver": "pade"}, "solver='pade' is for sqrt and invsqrt"),
        ({"normalisation": "tracee"}, "unknown normalisation 'tracee'; did you mean 'trace'"),
        ({"isometric": True, "triu": False}, "needs triu=True"),
        ({"eps": -1.0}, "eps must be"),
        ({"reduction": 0}, "must be positive"),
    ],
    ids=str,
)
@pytest.mark.parametrize("layer", [GlobalCovariancePool2d, TokenCovariancePool])
def test_options_that_cannot_be_are_refused(layer, options, message):
    with pytest.raises(ValueError, match=message):
        layer(4, **options)


@pytest.mark.parametrize("layer", [GlobalCovariancePool2d, TokenCovariancePool])
def test_a_head_is_made_on_the_device_and_in_the_dtype_asked_for(layer):
    head = layer(6, reduction=4, isometric=True, dtype=torch.float64)
    assert {t.dtype for t in (*head.parameters(), *head.buffers()) if t.is_floating_point()} == {torch.float64}
    lazy = layer(6, reduction=4, isometric=True, device="meta", dtype=torch.float64)
    assert all(t.is_meta for t in (*lazy.parameters(), *lazy.buffers()))
    x = torch.randn(2, 6, 6, 6, dtype=torch.float64)[:, :, : (6 if layer is GlobalCovariancePool2d else 1)]
    x = x if layer is GlobalCovariancePool2d else x.squeeze(2)
    assigned = copy.deepcopy(lazy)
    lazy.to_empty(device="cpu").load_state_dict(head.state_dict())
    assert torch.equal(lazy(x), head(x))
    assigned.load_state_dict(head.state_dict(), assign=True)
    assert torch.equal(assigned(x), head(x))


@pytest.mark.parametrize("isometric", [False, True])
def test_a_head_without_parameters_comes_from_meta_as_it_is(isometric):
    """Not even its device is saved anywhere."""
    head = GlobalCovariancePool2d(7, isometric=isometric)
    with torch.device("meta"):
        lazy = GlobalCovariancePool2d(7, isometric=isometric)
    x = torch.randn(2, 7, 5, 5)
    assert not [*lazy.buffers()]  # which to_empty would leave unwritten
    lazy.to_empty(device="cpu").load_state_dict(head.state_dict())
    assert torch.equal(lazy(x), head(x))


@pytest.mark.parametrize("first", ["inference", "grad", "meta"])
def test_the_triangle_that_is_remembered_serves_every_later_call(first):
    d = {"inference": 11, "grad": 12, "meta": 13}[first]  # sizes of their own
    head, x = GlobalCovariancePool2d(d, eps=1.0), torch.randn(2, d, 5, 5, dtype=torch.float64)
    if first == "inference":
        with torch.inference_mode():
            head(x)
    elif first == "grad":
        torch.func.grad(lambda x: head(x).sum())(x)
    else:
        assert head(x.to("meta")).is_meta
    x.requires_grad_()
    expected = head.spectral(x.flatten(2))[:, *torch.triu_indices(d, d)]
    y = head(x)
    torch.testing.assert_close(y, expected, rtol=0.0, atol=0.0)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])


@pytest.mark.parametrize(("value", "message"), [(0.0, "give eps > 0"), (float("nan"), "")])
def test_what_the_function_cannot_take_is_an_error_that_names_the_layer(value, message):
    pool = GlobalCovariancePool2d(6, function="log")
    pool.spectral.layer_name = "head.spectral"
    with pytest.raises(ValueError, match=rf"head\.spectral.*{message}"):
        pool(torch.full((1, 6, 2, 2), value))


def test_spectral_layer_takes_a_function_of_ones_own():
    X = torch.randn(2, 4, 30, dtype=torch.float64)
    cubed = SpectralLayer(torch.linalg.matrix_exp, eps=0.5)(X)
    expected = torch.matrix_exp(covariance(X) + 0.5 * torch.eye(4, dtype=X.dtype))
    torch.testing.assert_close(cubed, expected)
    torch.testing.assert_close(SpectralLayer("exp", eps=0.5)(X), expected)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("options", [{}, {"normalisation": "trace"}, {"normalisation": "frobenius"}], ids=str)
def test_spectral_layer_gives_the_same_from_features_and_from_their_covariance(function, options):
    X = torch.randn(2, 4, 30, dtype=torch.float64)
    from_features = SpectralLayer(function, eps=1e-3, **options)(X)
    from_covariance = SpectralLayer(function, "covariance", eps=1e-3, **options)(covariance(X))
    torch.testing.assert_close(from_features, from_covariance)


def test_a_head_of_matrix_products_compiles_whole(fresh_compiler):
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    pool = GlobalCovariancePool2d(4, solver=NewtonSchulz(5, tolerance=None), isometric=True)
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), pool(x))
    gradients = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, pool)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("function", ["sqrt", "invsqrt"])
@pytest.mark.parametrize("eps", [1e-8, 1e-5, 1e-3])
def test_a_ridge_keeps_the_accuracy_of_the_factor_form(function, eps):
    """A 7 × 7 map of 256 channels: rank 48. Formed in single precision P loses 1e-4 to 1e-1 of these gradients."""
    x, weights = torch.randn(1, 256, 49).relu(), torch.randn(1, 256, 256)

    def gradient(x):
        x = x.clone().requires_grad_()
        (SpectralLayer(function, eps=eps)(x) * weights.to(x.dtype)).sum().backward()
        return x.grad

    single, double = gradient(x), gradient(x.double())
    # The work is in double precision: what is left is the rounding of the result, and of its mean over 49 positions.
    assert (single - double).norm() < 2e-6 * double.norm()


def test_any_module_with_the_mark_may_be_the_spectral_layer():
    """A spectral layer needs an attribute and no base class."""

    class Gram(torch.nn.Module):
        is_spectral_layer = True

        def forward(self, x):
            return x @ x.mT

    pool, tokens = GlobalCovariancePool2d(6), TokenCovariancePool(6)
    pool.spectral = tokens.spectral = Gram()
    assert pool(torch.randn(2, 6, 5, 5)).shape == tokens(torch.randn(2, 25, 6)).shape == (2, 21)
