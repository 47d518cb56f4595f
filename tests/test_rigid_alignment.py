"""Rigid alignment: the best rotation and translation, never a reflection, differentiable at any singular values."""

import pytest
import torch

from helpers import eps_of
from wellcond.linalg import NonFiniteMatrixError
from wellcond.nn.functional import rigid_align

OCTAHEDRON = torch.cat([torch.eye(3), -torch.eye(3)]).double()
"""Its covariance is a multiple of the identity: all singular values of H are the same."""


def rotation(d=3, dtype=torch.float64):
    Q = torch.linalg.qr(torch.randn(d, d, dtype=dtype)).Q
    return torch.cat([Q[:, :1] * torch.linalg.det(Q), Q[:, 1:]], 1)


def mirrored(x, flat=0.3):
    """Points and their mirror image in their thinnest direction, turned: the best orthogonal map is a reflection."""
    x = x * torch.tensor([1.0, 1.0, flat], dtype=x.dtype)
    return x, (x * torch.tensor([1.0, 1.0, -1.0], dtype=x.dtype)) @ rotation().T


CLOUDS = {
    "noisy": lambda: (x := torch.randn(7, 3, dtype=torch.float64), x @ rotation().T + 0.1 * torch.randn_like(x)),
    "all singular values equal": lambda: (OCTAHEDRON, OCTAHEDRON @ rotation().T),
    "two equal": lambda: (x := OCTAHEDRON * torch.tensor([1.0, 1.0, 0.3]).double(), x @ rotation().T),
    "in a plane": lambda: (x := torch.randn(6, 3).double() * torch.tensor([1.0, 1.0, 0.0]), x @ rotation().T),
    "reflection": lambda: mirrored(torch.randn(7, 3, dtype=torch.float64)),
    "reflection, two equal": lambda: mirrored(OCTAHEDRON),
    "two dimensions": lambda: (x := torch.randn(5, 2).double(), x @ rotation(2).T + 0.1 * torch.randn_like(x)),
}


def cost(R, t, x, y, w):
    return (w * (x @ R.mT + t - y).square().sum(-1)).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [2, 3, 5])
def test_an_exact_pose_is_recovered_in_a_batch(d, dtype):
    R = torch.stack([rotation(d) for _ in range(4)]).to(dtype)
    x, t = torch.randn(4, 30, d, dtype=dtype), 3 * torch.randn(4, d, dtype=dtype)
    found_R, found_t = rigid_align(x, x @ R.mT + t.unsqueeze(-2), torch.rand(4, 30, dtype=dtype))
    # Rounding of the centred points relative to the smallest singular value of their weighted covariance, above 1/50.
    torch.testing.assert_close(found_R, R, rtol=0, atol=1e3 * eps_of(dtype))
    torch.testing.assert_close(found_t, t, rtol=0, atol=1e4 * eps_of(dtype))


@pytest.mark.parametrize("name", CLOUDS)
def test_the_result_is_a_rotation_and_no_other_one_is_better(name):
    x, y = CLOUDS[name]()
    w = torch.rand(len(x), dtype=torch.float64)
    d = x.shape[-1]
    R, t = rigid_align(x, y, w)
    torch.testing.assert_close(R.T @ R, torch.eye(d, dtype=R.dtype))
    torch.testing.assert_close(torch.linalg.det(R), torch.ones((), dtype=R.dtype))
    A = torch.randn(2000, d, d, dtype=R.dtype) * torch.logspace(-4, 1, 2000, dtype=R.dtype).view(-1, 1, 1)
    others = R @ torch.matrix_exp(A - A.mT)  # near and far
    mean_x, mean_y = ((w[:, None] * p).sum(0) / w.sum() for p in (x, y))
    shifts = mean_y - (others @ mean_x.unsqueeze(-1)).squeeze(-1)  # the best for each of them
    best = cost(R, t, x, y, w)
    assert cost(others, shifts.unsqueeze(-2), x, y, w).min() >= best - 1e-12 * w.sum()
    assert cost(R, t + 1e-3, x, y, w) > best


def test_weights_are_multiplicities():
    x = torch.randn(5, 3, dtype=torch.float64)
    y = x @ rotation().T + torch.randn_like(x)
    counts = torch.tensor([1, 3, 0, 2, 1])
    weighted = rigid_align(x, y, 0.1 * counts)
    repeated = rigid_align(x.repeat_interleave(counts, 0), y.repeat_interleave(counts, 0))
    for a, b in zip(weighted, repeated, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CLOUDS)
def test_derivatives_match_finite_differences_twice(name):
    x, y = (p.clone().requires_grad_() for p in CLOUDS[name]())
    w = (0.5 + torch.rand(len(x), dtype=torch.float64)).requires_grad_()
    if "equal" in name:
        w = torch.ones(len(x), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rigid_align, (x, y, w))
    assert torch.autograd.gradgradcheck(rigid_align, (x, y, w))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_rotation_does_not_see_the_scale_of_the_points(scale):
    x = torch.randn(9, 3)
    y = x @ rotation(dtype=torch.float32).T + 0.1 * torch.randn(9, 3)
    R, t = rigid_align(scale * x, scale * y)
    expected_R, expected_t = rigid_align(x, y)
    torch.testing.assert_close(R, expected_R, rtol=0, atol=1e2 * eps_of(torch.float32))
    torch.testing.assert_close(t / scale, expected_t, rtol=0, atol=1e2 * eps_of(torch.float32))


@pytest.mark.parametrize("far", [1e20, 1e30])
def test_a_point_without_weight_does_not_count_however_far_it_is(far):
    x = torch.randn(9, 3)
    y = x @ rotation(dtype=torch.float32).T
    w = torch.ones(9)
    x[4], w[4] = far, 0.0
    seen = w > 0
    R, _ = rigid_align(x, y, w)
    torch.testing.assert_close(R, rigid_align(x[seen], y[seen])[0], rtol=0, atol=1e2 * eps_of(torch.float32))


def test_vmap_is_a_loop():
    x, y = torch.randn(4, 6, 3, dtype=torch.float64), torch.randn(4, 6, 3, dtype=torch.float64)
    for batched, mapped in zip(rigid_align(x, y), torch.func.vmap(rigid_align)(x, y), strict=True):
        torch.testing.assert_close(batched, mapped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_aligned_in_float32(dtype):
    x, y = torch.randn(9, 3).to(dtype), torch.randn(9, 3).to(dtype)
    R, t = rigid_align(x, y)
    expected_R, expected_t = rigid_align(x.float(), y.float())
    assert torch.equal(R, expected_R.to(dtype)) and torch.equal(t, expected_t.to(dtype))


def test_one_point_gives_a_rotation_and_a_finite_gradient():
    x, y = (torch.randn(1, 3, requires_grad=True) for _ in range(2))
    R, t = rigid_align(x, y)
    (R.sum() + t.sum()).backward()
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(()))
    assert x.grad.isfinite().all()
    assert y.grad.isfinite().all()


@pytest.mark.parametrize(
    ("source", "target", "weights", "message"),
    [
        ((5, 3), (4, 3), None, "same number of corresponding points"),
        ((5, 3), (5, 2), None, "same number of corresponding points"),
        ((5, 3), (5, 3), (4,), r"weights must be \(\.\.\., 5\), got \(4,\)"),
        ((5, 1), (5, 1), None, "at least 2 dimensions"),
        ((3,), (5, 3), None, "source must be floating points"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(source, target, weights, message):
    with pytest.raises(ValueError, match=message):
        rigid_align(torch.randn(source), torch.randn(target), None if weights is None else torch.rand(weights))


def test_non_finite_points_are_refused():
    x = torch.randn(5, 3)
    x[2, 1] = float("nan")
    with pytest.raises(NonFiniteMatrixError, match="NaN or infinite"):
        rigid_align(x, torch.randn(5, 3))
