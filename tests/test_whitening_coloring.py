"""Whitening and colouring: the result has the style's mean and covariance, as far as the content's rank reaches."""

import pytest
import torch
from torch import nn

from helpers import eps_of, features_with, geometric
from wellcond.linalg import covariance
from wellcond.monitor import ConditionMonitor
from wellcond.nn import WhiteningColoring
from wellcond.nn.functional import whitening_coloring
from wellcond.orthogonality import pre_spectral_layers


def features(d, n, kappa=100.0, mean=2.0):
    """(d, n) with a spectrum from 1 to 1/κ, or of rank n − 1 if that is less."""
    eigvals = geometric(min(d, n - 1), kappa)
    return features_with(eigvals + [0.0] * (d - len(eigvals)), n) + mean * torch.randn(d, 1, dtype=torch.float64)


def moments(x):
    return x.mean(-1), covariance(x)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize("samples", [7, 40], ids=["few style pixels", "many style pixels"])
def test_zca_matches_the_style_exactly_where_the_content_has_full_rank(eps, samples):
    kappa = 100.0
    content, style = features(8, 30, kappa), features(8, samples)
    mean, P = moments(whitening_coloring(content, style, eps=eps))
    style_mean, style_P = moments(style)
    torch.testing.assert_close(mean, style_mean)
    # I − P_c (P_c + ε)^{-1} = ε (P_c + ε)^{-1}, and λ_min(P_c) = 1/κ; the largest eigenvalue of the style is 1.
    bound = eps / (1 / kappa + eps) + 1e3 * kappa * eps_of(P.dtype)
    assert torch.linalg.matrix_norm(P - style_P, 2) <= bound


@pytest.mark.parametrize("samples", [4, 40], ids=["few style pixels", "many style pixels"])
def test_with_fewer_content_pixels_than_channels_the_style_is_matched_on_the_range_of_the_content(samples):
    content, style = features(8, 6), features(8, samples)
    mean, P = moments(whitening_coloring(content, style, eps=0.0))
    style_mean, style_P = moments(style)
    torch.testing.assert_close(mean, style_mean)
    U = torch.linalg.svd(content - content.mean(1, keepdim=True)).U[:, :5]
    V, sigma, _ = torch.linalg.svd((style - style.mean(1, keepdim=True)) / samples**0.5, full_matrices=False)
    root = (V * sigma) @ V.T
    torch.testing.assert_close(P, root @ U @ U.T @ root, rtol=0, atol=1e-11)
    # The same spectrum as the style's covariance restricted to that range.
    inside = torch.linalg.eigvalsh(U.T @ style_P @ U)
    torch.testing.assert_close(torch.linalg.eigvalsh(P)[-5:], inside, rtol=0, atol=1e-11)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("samples", [7, 40], ids=["few style pixels", "many style pixels"])
def test_cholesky_matches_the_style_plus_ridge(eps, samples):
    kappa = 100.0
    content, style = features(8, 30, kappa), features(8, samples)
    mean, P = moments(whitening_coloring(content, style, eps=eps, method="cholesky"))
    style_mean, style_P = moments(style)
    torch.testing.assert_close(mean, style_mean)
    target = style_P + eps * torch.eye(8, dtype=P.dtype)
    assert torch.linalg.matrix_norm(P - target, 2) <= (1 + eps) * eps / (1 / kappa + eps) + 1e-10


@pytest.mark.parametrize("shape", [(8, 30), (8, 6)], ids=["full rank", "rank deficient"])
def test_cholesky_leaves_features_alone_that_are_their_own_style(shape):
    x = features(*shape)
    # Both triangular factors are the same, to eps times the condition number 1e2/1e-3.
    torch.testing.assert_close(whitening_coloring(x, x, eps=1e-3, method="cholesky"), x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["zca", "cholesky"])
def test_groups_are_transformed_each_by_itself(method):
    content, style = torch.randn(2, 6, 4, 5, dtype=torch.float64), torch.randn(2, 6, 7, 3, dtype=torch.float64)
    whole = whitening_coloring(content, style, eps=1e-4, groups=2, method=method)
    parts = [
        whitening_coloring(content[:, g], style[:, g], eps=1e-4, method=method) for g in (slice(0, 3), slice(3, 6))
    ]
    torch.testing.assert_close(whole, torch.cat(parts, 1))


def test_a_batch_is_a_loop_and_one_style_serves_all():
    content, style = torch.randn(3, 4, 6, 5, dtype=torch.float64), torch.randn(1, 4, 50, dtype=torch.float64)
    whole = whitening_coloring(content, style, eps=1e-4)
    for image, y in zip(content, whole, strict=True):
        torch.testing.assert_close(whitening_coloring(image.flatten(1), style[0], eps=1e-4), y.flatten(1))
    styled = whitening_coloring(style, content, eps=1e-4)
    assert styled.shape == (3, 4, 50)


@pytest.mark.parametrize("value", [0.1, 7.7])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options", [{"eps": 0.0}, {"eps": 1e-2, "relative": True}, {"eps": 1e-2, "relative": True, "method": "cholesky"}]
)
def test_constant_content_takes_the_mean_of_the_style_and_a_constant_style_is_taken_over(value, masked, options):
    """The mean of 49 times 7.7 is not 7.7: what is left is no content to be whitened, in whatever precision."""
    style, mask = torch.randn(1, 6, 7, 7), torch.rand(1, 7, 7) > 0.5 if masked else None
    chosen = mask if mask is not None else torch.ones(1, 7, 7, dtype=torch.bool)
    for content in (torch.full((1, 6, 7, 7), value), torch.full((1, 6, 7, 7), value, dtype=torch.float64)):
        y = whitening_coloring(content, style.to(content), content_mask=mask, **options)
        wanted = style.mean((2, 3)).to(content).expand(chosen.sum(), 6)
        torch.testing.assert_close(y.movedim(1, -1)[chosen], wanted, rtol=0, atol=4 * eps_of(torch.float32))
    y = whitening_coloring(style, torch.full((1, 6, 5, 5), value), content_mask=mask, **options)
    # Cholesky gives the constant the ridge for a covariance.
    atol = 4 * value * eps_of(torch.float32)
    if "method" not in options:
        torch.testing.assert_close(y.movedim(1, -1)[chosen], torch.full((chosen.sum(), 6), value), rtol=0, atol=atol)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha_blends_between_content_and_transform(alpha):
    content, style = features(4, 20), features(4, 30)
    full = whitening_coloring(content, style, eps=0.0)
    blended = whitening_coloring(content, style, eps=0.0, alpha=alpha)
    torch.testing.assert_close(blended, alpha * full + (1 - alpha) * content)


@pytest.mark.parametrize("pixels", [5, 20], ids=["fewer pixels than channels", "more"])
def test_masks_choose_what_counts_and_what_changes(pixels):
    content, style = torch.randn(2, 8, 6, 6, dtype=torch.float64), torch.randn(2, 8, 5, 9, dtype=torch.float64)
    c_mask, s_mask = torch.zeros(2, 36, dtype=torch.bool), torch.zeros(2, 45, dtype=torch.bool)
    for i in range(2):  # as many in each image, so that a loop can pick them out
        c_mask[i, torch.randperm(36)[:pixels]] = True
        s_mask[i, torch.randperm(45)[: pixels + 3]] = True
    y = whitening_coloring(
        content, style, eps=0.0, content_mask=c_mask.view(2, 6, 6), style_mask=s_mask.view(2, 5, 9)
    ).flatten(2)
    for i in range(2):
        chosen = content[i].flatten(1)[:, c_mask[i]]
        alone = whitening_coloring(chosen, style[i].flatten(1)[:, s_mask[i]], eps=0.0)
        torch.testing.assert_close(y[i][:, c_mask[i]], alone, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(y[i][:, ~c_mask[i]], content[i].flatten(1)[:, ~c_mask[i]], rtol=0, atol=0)


def test_a_mask_of_one_pixel_takes_the_mean_of_the_style():
    content, style = torch.randn(3, 10), torch.randn(3, 20)
    mask = torch.zeros(10, dtype=torch.bool)
    mask[4] = True
    y = whitening_coloring(content, style, eps=1e-3, content_mask=mask)
    torch.testing.assert_close(y[:, 4], style.mean(1))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("method", ["zca", "cholesky"])
def test_a_relative_eps_does_not_see_the_scale_of_either(scale, method):
    content, style = features(5, 40), features(5, 40)
    expected = whitening_coloring(content, style, eps=1e-2, relative=True, method=method)
    scaled = whitening_coloring(scale * content, style / scale, eps=1e-2, relative=True, method=method)
    torch.testing.assert_close(scale * scaled, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3, 8), {"eps": 0.0}),
        ((5, 4), {"eps": 0.0}),
        ((5, 4), {"eps": 1e-2, "alpha": 0.6}),
        ((4, 9), {"eps": 1e-2, "groups": 2, "relative": True}),
        ((5, 4), {"eps": 1e-2, "method": "cholesky", "relative": True}),
    ],
    ids=str,
)
def test_gradients_of_content_and_style_match_finite_differences(shape, options, masked):
    content, style = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.arange(shape[1]) != 1
    masks = {"content_mask": mask, "style_mask": mask} if masked else {}
    assert torch.autograd.gradcheck(lambda c, s: whitening_coloring(c, s, **options, **masks), (content, style))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_computed_in_float32(dtype):
    content, style = torch.randn(2, 4, 6, 6).to(dtype), torch.randn(2, 4, 5, 5).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = whitening_coloring(content, style, eps=1e-3)
    expected = whitening_coloring(content.float(), style.float(), eps=1e-3)
    assert y.dtype == dtype
    assert (y.float() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


def test_the_style_is_taken_to_the_dtype_of_the_content():
    content, style = torch.randn(3, 20), torch.randn(3, 30, dtype=torch.float64)
    y = whitening_coloring(content, style, eps=1e-3)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, whitening_coloring(content, style.float(), eps=1e-3), rtol=0, atol=0)


def test_float32_of_fewer_pixels_than_channels_has_no_rounding_noise():
    content, style = torch.randn(64, 20), torch.randn(64, 100)
    y, truth = (whitening_coloring(c, s, eps=0.0) for c, s in ((content, style), (content.double(), style.double())))
    # Whitening amplifies the rounding of the centred content by σ_max/σ_min, below 10 here.
    assert (y.double() - truth).abs().max() < 100 * eps_of(torch.float32) * truth.abs().max()


def test_the_layer_is_the_function_and_a_spectral_layer():
    layer = WhiteningColoring(1e-3, alpha=0.5, method="cholesky", groups=2)
    content, style = torch.randn(2, 4, 6, 6), torch.randn(1, 4, 5, 5)
    expected = whitening_coloring(content, style, eps=1e-3, alpha=0.5, method="cholesky", groups=2)
    torch.testing.assert_close(layer(content, style), expected)

    class Transfer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Conv2d(3, 4, 3)
            self.transfer = WhiteningColoring(1e-3, relative=True)

        def forward(self, content, style):
            return self.transfer(self.encoder(content), self.encoder(style))

    model = Transfer()
    assert list(pre_spectral_layers(model)) == ["encoder"]
    with ConditionMonitor(model, every=1) as monitor:
        model(torch.randn(1, 3, 9, 9), torch.randn(1, 3, 9, 9))
    assert [record.layer for record in monitor.records] == ["transfer"]


def test_non_finite_content_is_an_error_that_names_the_layer():
    layer = WhiteningColoring(1e-3)
    layer.layer_name = "decoder.transfer"
    with pytest.raises(ValueError, match=r"decoder\.transfer"):
        layer(torch.full((1, 3, 4, 4), float("nan")), torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match="NaN or infinite"):
        whitening_coloring(torch.full((3, 5), float("nan")), torch.randn(3, 5), eps=1e-3, method="cholesky")


@pytest.mark.parametrize(
    ("content", "style", "options", "message"),
    [
        ((4, 9), (3, 9), {}, "same channels, got 4 and 3"),
        ((1, 4, 9), (4, 9), {}, "batched or neither"),
        ((2, 4, 9), (3, 4, 9), {}, "batches of 2 and 3"),
        ((4,), (4,), {}, "got shape"),
        ((4, 9), (4, 9), {"groups": 3}, "divisible by groups"),
        ((4, 9), (4, 9), {"alpha": 1.5}, "alpha must lie in"),
        ((4, 9), (4, 9), {"eps": -1.0}, "eps must be"),
        ((4, 9), (4, 9), {"method": "pca"}, "unknown method 'pca'"),
        ((4, 9), (4, 9), {"content_mask": torch.ones(8, dtype=torch.bool)}, "content_mask must be boolean of shape"),
        ((4, 9), (4, 9), {"style_mask": torch.zeros(9, dtype=torch.bool)}, "style_mask chooses no position"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(content, style, options, message):
    with pytest.raises(ValueError, match=message):
        whitening_coloring(torch.randn(content), torch.randn(style), **{"eps": 1e-3, **options})


@pytest.mark.parametrize("which", [0, 1], ids=["content", "style"])
def test_a_singular_covariance_without_a_ridge_has_no_cholesky_factor(which):
    pair = [torch.randn(4, 9), torch.randn(4, 9)]
    pair[which][2] = 0.0  # exactly: a rank that is lost by rounding alone may leave a tiny pivot
    with pytest.raises(ValueError, match="no Cholesky factor"):
        whitening_coloring(*pair, eps=0.0, method="cholesky")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 3.0}, r"alpha must lie in \[0, 1\], got 3.0"),
        ({"method": "zcaa"}, "unknown method 'zcaa'; did you mean 'zca'"),
        ({"groups": 0}, "groups must be at least 1, got 0"),
        ({"eps": -1.0}, "eps must be a finite number >= 0, got -1.0"),
    ],
)
def test_the_layer_refuses_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        WhiteningColoring(**{"eps": 1e-5, **options})
