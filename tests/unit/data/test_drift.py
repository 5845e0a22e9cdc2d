import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from distcl import registry
from distcl.data.drift import Affine, Blur, Noise, Permute, Rotate, Split
from distcl.errors import ConfigError
from distcl.types import DataSpec, pack_ids

SHAPES = [(1, 8, 8), (3, 7, 10), (1, 28, 28)]
CHANGING = ["rotate", "affine", "permute", "noise", "blur"]


def spec(shape, classes=10):
    return DataSpec(shape, classes)


def samples(n, shape, dtype=torch.float32):
    x = torch.rand((n, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.to(dtype), pack_ids(3, np.arange(n))


def warped(image, matrix):
    """The image [H, W] read at matrix @ (x, y, 1), in pixels around the centre: dense reference."""
    centre = (np.array(image.shape) - 1) / 2
    swapped = np.array([[matrix[1, 1], matrix[1, 0]], [matrix[0, 1], matrix[0, 0]]])
    shift = matrix[[1, 0], 2] + centre - swapped @ centre
    return ndimage.affine_transform(image, swapped, shift, order=1, mode="grid-constant")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CHANGING)
def test_a_sample_has_the_same_bits_in_any_batch_and_order(name, shape):
    drift = registry.create("drift", name, 1.0, 7, spec(shape), 4)
    x, ids = samples(130, shape)
    threads = torch.get_num_threads()
    try:
        for dtype in (torch.float32, torch.float64):
            x = x.to(dtype)
            whole = drift.apply(x, 3, ids)
            assert whole.dtype == dtype and whole.shape == x.shape
            for count in (1, 2):
                torch.set_num_threads(count)
                for size in (1, 2, 3, 8, 17, 64):
                    at = np.random.default_rng(size).permutation(len(ids))
                    cuts = [at[i : i + size] for i in range(0, len(at), size)]
                    parts = torch.cat([drift.apply(x[c], 3, ids[c]) for c in cuts])
                    assert torch.equal(parts, whole[at])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CHANGING)
def test_experience_0_is_undrifted_and_no_input_is_changed(name):
    drift = registry.create("drift", name, 1.0, 7, spec((1, 8, 8)), 3)
    x, ids = samples(5, (1, 8, 8))
    before = x.clone()
    assert torch.equal(drift.apply(x, 0, ids), before)
    assert not torch.equal(drift.apply(x, 1, ids), before)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", CHANGING)
def test_what_is_first_used_in_inference_mode_works_outside(name):
    drift = registry.create("drift", name, 1.0, 7, spec((1, 8, 8)), 3)
    x, ids = samples(5, (1, 8, 8))
    with torch.inference_mode():
        inside = drift.apply(x, 2, ids)
    outside = drift.apply(x, 2, ids)
    assert torch.equal(inside, outside) and not outside.is_inference()
    outside.requires_grad_().sum().backward()


@pytest.mark.parametrize("name", ["affine", "permute", "noise", "split"])
def test_the_seed_alone_decides(name):
    def result(seed, experiences=4):
        drift = registry.create("drift", name, 1.0, seed, spec((1, 8, 8)), experiences)
        x, ids = samples(5, (1, 8, 8))
        moved = drift.apply(x, 2, ids).flatten()
        return torch.cat([moved, torch.from_numpy(drift.members(np.arange(10), 2))])

    assert torch.equal(result(1), result(1))
    assert not torch.equal(result(1), result(2))
    if name != "split":  # a longer stream begins like a shorter one
        assert torch.equal(result(1), result(1, experiences=9))


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 9, 9)])
def test_rotating_by_90_degrees_is_rot90(shape):
    drift = Rotate(1.0, 0, spec(shape), 8)
    x, ids = samples(4, shape)
    for turns in (1, 2):
        torch.testing.assert_close(
            drift.apply(x, 3 * turns, ids), torch.rot90(x, turns, (-2, -1)), atol=2e-6, rtol=0
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_equals_a_dense_reference(shape):
    x, ids = samples(2, shape, torch.float64)
    moved = Rotate(0.5, 0, spec(shape), 3).apply(x, 2, ids)
    angle = math.radians(30)
    matrix = np.array(
        [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]]
    )
    expected = [[warped(channel, matrix) for channel in image] for image in x.numpy()]
    np.testing.assert_allclose(moved.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_affine_maps_accumulate(shape):
    drift = Affine(1.0, 3, spec(shape), 5)
    maps = drift._maps
    x, ids = samples(2, shape, torch.float64)
    small = [np.eye(3)] + [np.linalg.inv(maps[e - 1]) @ maps[e] for e in range(1, 5)]
    total = np.eye(3)
    for concept in range(1, 5):
        m = small[concept]
        assert np.abs(m - np.eye(3)).max() > 0
        assert np.abs(m[:2, :2] - np.eye(2)).max() < 0.5
        assert (np.abs(m[:2, 2]) <= 0.1 * 1.1 * max(shape[1:]) / 2).all()
        total = total @ m
        moved = drift.apply(x, concept, ids)
        expected = [[warped(channel, total) for channel in image] for image in x.numpy()]
        np.testing.assert_allclose(moved.numpy(), expected, atol=1e-4)


def test_severity_0_moves_nothing():
    x, ids = samples(3, (1, 8, 8))
    for name in CHANGING:
        drift = registry.create("drift", name, 0.0, 7, spec((1, 8, 8)), 3)
        torch.testing.assert_close(drift.apply(x, 2, ids), x, atol=1e-5, rtol=0)


def test_permute_is_one_permutation_per_experience():
    drift = Permute(1.0, 1, spec((12,)), 4)
    x = torch.arange(36.0).view(3, 12)
    orders = [drift.apply(x, concept, np.arange(3)) for concept in range(1, 4)]
    for moved in orders:
        assert sorted(moved[0].tolist()) == list(range(12))
        assert torch.equal(moved - moved[:1], x - x[:1])
    assert len({tuple(moved[0].tolist()) for moved in orders}) == 3


def test_permute_moves_only_a_share_at_low_severity():
    drift = Permute(0.25, 1, spec((1, 20, 20)), 2)
    x = torch.arange(400.0).view(1, 1, 20, 20)
    moved = drift.apply(x, 1, np.arange(1))
    assert sorted(moved.flatten().tolist()) == list(range(400))
    assert 90 < (moved != x).sum() <= 100


def test_noise_is_normal_independent_and_grows():
    drift = Noise(2.0, 5, spec((1, 10, 10)), 4)
    ids = pack_ids(2, np.arange(2000))
    zeros = torch.zeros((2000, 1, 10, 10), dtype=torch.float64)
    noise = {concept: drift.apply(zeros, concept, ids).numpy().ravel() for concept in (1, 3)}
    for concept, values in noise.items():
        assert stats.kstest(values / (0.2 * concept), "norm").pvalue > 0.01
        assert abs(values.std() / (0.2 * concept) - 1) < 0.01
    table = noise[1].reshape(2000, 100)
    for correlation in (np.corrcoef(table, rowvar=False), np.corrcoef(table[:300])):
        off = correlation[~np.eye(len(correlation), dtype=bool)]
        assert np.abs(off).max() < 6 / math.sqrt(100 if len(correlation) == 300 else 2000)
    elsewhere = drift.apply(zeros, 1, pack_ids(3, np.arange(2000))).numpy().ravel()
    held_out = drift.apply(zeros, 1, pack_ids(2, np.arange(2000), test=True)).numpy().ravel()
    for other in (elsewhere, held_out):
        assert abs(np.corrcoef(noise[1], other)[0, 1]) < 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_blur_equals_a_dense_reference_and_grows(shape):
    drift = Blur(1.5, 0, spec(shape), 6)
    x, ids = samples(2, shape, torch.float64)
    spread = [x.std()]
    for concept in (1, 2, 5):
        sigma = 0.75 * concept
        blurred = drift.apply(x, concept, ids)
        expected = ndimage.gaussian_filter(
            x.numpy(), sigma, mode="nearest", radius=math.ceil(3 * sigma), axes=(2, 3)
        )
        np.testing.assert_allclose(blurred.numpy(), expected, atol=1e-12)
        spread.append(blurred.std())
    assert spread == sorted(spread, reverse=True)


@pytest.mark.parametrize(("classes", "experiences"), [(10, 5), (10, 4), (7, 7), (3, 1)])
def test_split_deals_every_class_once_and_evenly(classes, experiences):
    drift = Split(1.0, 4, spec((2,), classes), experiences)
    labels = np.arange(classes)
    masks = np.stack([drift.members(labels, e) for e in range(experiences)])
    assert (masks.sum(axis=0) == 1).all()
    counts = masks.sum(axis=1)
    assert counts.max() - counts.min() <= 1


def test_split_refuses_fewer_classes_than_experiences():
    with pytest.raises(ConfigError, match=r"'split'.* 4 concepts .* have 3"):
        Split(1.0, 0, spec((2,), 3), 4)


@pytest.mark.parametrize("name", ["rotate", "affine", "blur"])
@pytest.mark.parametrize("shape", [(64,), (8, 8), ()])
def test_image_drifts_refuse_other_shapes(name, shape):
    with pytest.raises(ConfigError, match=f"stream.drift = '{name}' needs images"):
        registry.create("drift", name, 1.0, 0, spec(shape), 3)
