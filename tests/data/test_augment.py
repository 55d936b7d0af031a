"""Augmentation: hand-computed cases, statistics, and that splitting a batch changes nothing."""

import math

import numpy as np
import pytest
import torch

from data import augment
from data.augment import (
    Augment,
    Batch,
    Draws,
    augmented,
    beta,
    crop,
    crop_boxes,
    hflip,
    hflips,
    mirrored,
    mix,
    mix_maps,
    normalise,
    partners,
    pixel_scale,
)
from kernels.philox import Stream, uniform
from tests.data.inputs import error_of

SCALE = pixel_scale((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
COUNT = 24
IMAGES = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (COUNT, 10, 8, 3), dtype=np.uint8))
LABELS = torch.arange(COUNT) % 5
CHOSEN = torch.from_numpy(np.random.default_rng(4).permutation(COUNT)[:17])


def rows(n):
    return torch.arange(n)


def make(settings=Augment(), which=None, seed=1, step=2, chosen=CHOSEN):
    which = rows(len(chosen)) if which is None else torch.as_tensor(which)
    return augmented(IMAGES, LABELS, chosen, which, settings, SCALE, rng(seed, step))


def rng(seed, step):
    return torch.tensor([seed, step, 0])


def draws(seed, step, batch):
    """The numbers of all images of a batch."""
    return Draws(rng(seed, step), batch, rows(batch))


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


# By hand


def test_normalise():
    images = torch.tensor([[[[0, 102, 255]]]], dtype=torch.uint8)
    seen = normalise(images, SCALE)
    assert seen.shape == (1, 3, 1, 1) and seen.dtype == torch.float32
    torch.testing.assert_close(seen.flatten(), torch.tensor([-2.5, 0.0, 1.4]), atol=1e-6, rtol=0)
    assert normalise(IMAGES, SCALE).is_contiguous()


def test_hflip():
    images = torch.arange(6.0).view(2, 1, 1, 3)
    assert hflip(images, torch.tensor([True, False])).flatten().tolist() == [2, 1, 0, 3, 4, 5]


def test_crop_of_the_whole_image_is_the_image():
    images = normalise(IMAGES, SCALE)
    boxes = torch.tensor([[0.0, 0.0, 8.0, 10.0]]).expand(COUNT, 4)
    torch.testing.assert_close(crop(images, boxes), images, atol=1e-5, rtol=0)


def test_crop_stretches_the_box_bilinearly():
    image = torch.arange(4.0).expand(2, 4).reshape(1, 1, 2, 4)  # each pixel holds its column
    left_half = crop(image, torch.tensor([[0.0, 0.0, 2.0, 2.0]]))
    # pixel j's middle lies at (j + 0.5) / 2 pixels, half a pixel left of the value it reads
    expected = torch.tensor([0.0, 0.25, 0.75, 1.25])  # the first would be -0.25: the border is repeated
    torch.testing.assert_close(left_half[0, 0], expected.expand(2, 4), atol=1e-6, rtol=0)
    right = crop(image, torch.tensor([[3.0, 1.0, 1.0, 1.0]]))
    torch.testing.assert_close(right[0, 0, 0], torch.tensor([2.625, 2.875, 3.0, 3.0]), atol=1e-6, rtol=0)
    rows_image = image.transpose(2, 3)
    torch.testing.assert_close(
        crop(rows_image, torch.tensor([[0.0, 0.0, 2.0, 2.0]]))[0, 0, :, 0], expected, atol=1e-6, rtol=0
    )


def test_crop_to_a_mirrored_box_is_the_crop_flipped():
    images, chosen = normalise(IMAGES, SCALE), hflips(draws(1, 2, COUNT), 0.5)
    boxes = crop_boxes(draws(1, 2, COUNT), (10, 8), (0.2, 0.9), (0.75, 1.33))
    assert 0 < chosen.sum() < COUNT
    expected = hflip(crop(images, boxes), chosen)
    torch.testing.assert_close(crop(images, mirrored(boxes, chosen)), expected, atol=1e-5, rtol=0)


def test_mix_of_two_images_by_hand():
    own, other = torch.full((2, 1, 2, 2), 8.0), torch.full((2, 1, 2, 2), 4.0)
    maps = torch.tensor([[[[0.25, 0.25], [0.25, 0.25]]], [[[1.0, 0.0], [1.0, 1.0]]]])
    assert mix(own, other, maps).flatten().tolist() == [5, 5, 5, 5, 8, 4, 8, 8]


def test_soft_targets():
    batch = Batch(
        torch.zeros(3), torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0]), torch.tensor([0.75, 0.25, 1.0])
    )
    assert batch.soft_targets(3).tolist() == [[0.75, 0, 0.25], [0, 1, 0], [0, 0, 1]]


def test_cutmix_box_is_where_it_was_drawn():
    numbers = {
        augment.WEIGHT: torch.full((2, 2 * augment.TRIES), 0.3, dtype=torch.float64),  # two alike: a weight of a half
        augment.MIX: torch.tensor([[0.9, 0.5, 0.5, 0.0], [0.9, 0.0, 0.95, 0.0]], dtype=torch.float64),
    }
    maps, weight = mix_maps(lambda stream, each: numbers[stream], (4, 4), "cutmix", 1.0)
    # the edge is sqrt(1/2) * 4 = 2.8 pixels, one to each side of the middle; the second box is cut off by two edges
    middle = [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]]
    corner = [[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]
    assert maps[:, 0].tolist() == [middle, corner] and weight.tolist() == [12 / 16, 14 / 16]


# A function of (seed, step) and the image's place in the batch


@pytest.mark.parametrize("kind", augment.MIXES)
@pytest.mark.parametrize("parts", [1, 2, 5, 17], ids=lambda n: f"{n} parts")
def test_micro_batches_and_processes_see_the_same_images(kind, parts):
    settings = Augment(mix=kind)
    whole = make(settings)
    for piece in rows(17).chunk(parts):
        part = make(settings, piece)
        for name, tensor in vars(part).items():
            assert torch.equal(tensor, getattr(whole, name)[piece]), name


def test_order_within_a_part_does_not_matter():
    which = torch.tensor([9, 3, 16, 0])
    whole, part = make(Augment(mix="both")), make(Augment(mix="both"), which)
    assert torch.equal(part.images, whole.images[which])


def test_a_whole_batch_in_another_order():
    which = torch.from_numpy(np.random.default_rng(5).permutation(17))
    whole, part = make(Augment(mix="both")), make(Augment(mix="both"), which)
    assert all(torch.equal(tensor, vars(whole)[name][which]) for name, tensor in vars(part).items())


def test_an_image_has_its_own_numbers():
    seen = Draws(rng(4, 2), 10, torch.tensor([7, 2]))(augment.CROP, 4)
    for row, image in enumerate((7, 2)):
        assert torch.equal(seen[row], uniform(4, 2, augment.CROP, 4, start=4 * image))


def test_seed_and_step_decide():
    settings = Augment(mix="both")
    assert same(make(settings), make(settings))
    for other in (make(settings, seed=2), make(settings, step=3)):
        assert not torch.equal(make(settings).images, other.images)


def test_steps_of_the_same_image_differ_and_images_of_a_step_too():
    boxes = torch.cat([crop_boxes(draws(1, step, 64), (32, 32), (0.1, 0.9), (0.75, 1.33)) for step in range(8)])
    assert len(boxes.unique(dim=0)) == 8 * 64


def test_nothing_switched_on_is_only_normalised():
    plain = make(Augment(hflip=0.0, crop_scale=(1.0, 1.0)))
    assert torch.equal(plain.images, normalise(IMAGES[CHOSEN], SCALE))
    assert torch.equal(plain.labels, LABELS[CHOSEN]) and (plain.weight == 1).all()
    assert plain.images.dtype == torch.float32 and plain.labels.dtype == torch.int64


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_are_made_of_the_two_they_name(kind):
    settings = Augment(hflip=0.0, crop_scale=(1.0, 1.0), mix=kind)
    mixed, plain = make(settings), normalise(IMAGES[CHOSEN], SCALE)
    partner = partners(rng(1, 2), 17)
    labels = LABELS[CHOSEN]
    assert torch.equal(mixed.labels, labels) and torch.equal(mixed.other_labels, labels[partner])
    if kind == "mixup":
        weight = mixed.weight[:, None, None, None]
        torch.testing.assert_close(mixed.images, weight * plain + (1 - weight) * plain[partner], atol=1e-5, rtol=0)
    else:
        own, other = mixed.images == plain, mixed.images == plain[partner]
        assert (own | other).all()
        share = own.all(dim=1).double().mean(dim=(1, 2))
        assert ((share - mixed.weight).abs() < 0.02).all()  # a pixel can be alike in both


def test_a_batch_of_one_is_mixed_with_itself():
    mixed = make(Augment(hflip=0.0, crop_scale=(1.0, 1.0), mix="cutmix"), chosen=CHOSEN[:1])
    assert torch.equal(mixed.images, normalise(IMAGES[CHOSEN[:1]], SCALE))


@pytest.mark.parametrize("batch", [2, 3, 17])
def test_partners_are_another_image_and_each_is_used_once(batch):
    seen = set()
    for step in range(60):
        partner = partners(rng(5, step), batch)
        assert sorted(partner.tolist()) == list(range(batch)) and (partner != rows(batch)).all()
        seen.add(int(partner[0]))
    assert len(seen) == min(batch - 1, len(seen)) and len(seen) >= min(batch - 1, 12)


def test_streams_are_those_of_no_layer():
    largest = max(value for name, value in vars(Stream).items() if name.isupper()) + 16 * 65_535
    streams = [augment.HFLIP, augment.CROP, augment.PARTNER, augment.MIX, augment.WEIGHT]
    assert min(streams) > largest and len(set(streams)) == 5 and max(streams) < 2**32


# Statistics


def test_share_of_flips():
    for probability in (0.0, 0.3, 0.5, 1.0):
        share = hflips(draws(7, 0, 20_000), probability).double().mean()
        assert abs(share - probability) <= 4 * math.sqrt(probability * (1 - probability) / 20_000)


def test_boxes_have_the_area_shape_and_place_asked_for():
    left, top, width, height = crop_boxes(draws(7, 0, 20_000), (40, 60), (0.1, 0.5), (0.5, 2.0)).double().unbind(1)
    for edge in (left, top, 60 - left - width, 40 - top - height):
        assert edge.min() >= -1e-4
    share, ratio = width * height / 2400, width / height
    whole = (width < 59.9) & (height < 39.9)
    assert share[whole].min() >= 0.0999 and share.max() <= 0.5001 and whole.double().mean() > 0.8
    assert ratio[whole].min() >= 0.4999 and ratio[whole].max() <= 2.0001
    small = crop_boxes(draws(8, 0, 20_000), (40, 60), (0.1, 0.2), (0.5, 2.0)).double()  # none of these is clipped
    area = small[:, 2] * small[:, 3] / 2400
    assert abs(area.mean() - 0.15) < 0.001 and abs(torch.log(small[:, 2] / small[:, 3]).mean()) < 0.012
    assert abs((small[:, 0] / (60 - small[:, 2])).mean() - 0.5) < 0.01


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0])
def test_weights_follow_the_beta_distribution(alpha):
    weight = beta(draws(3, 0, 20_000), alpha)
    assert weight.min() >= 0 and weight.max() <= 1
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(weight.mean() - 0.5) < 4 * math.sqrt(variance / 20_000)
    assert abs(weight.var() - variance) < 0.004
    if alpha == 1.0:  # uniform
        assert abs((weight < 0.2).double().mean() - 0.2) < 0.012


def test_both_is_half_of_each_and_weights_are_mean_maps():
    maps, weight = mix_maps(draws(3, 0, 4_000), (8, 8), "both", 0.8)
    cut = ((maps == 0) | (maps == 1)).all(dim=(1, 2, 3))
    assert abs(cut.double().mean() - 0.5) < 0.04
    torch.testing.assert_close(maps.mean(dim=(1, 2, 3)), weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"hflip": 1.5}, "hflip = 1.5"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale = (0.0, 1.0)"),
        ({"crop_scale": (0.5, 0.4)}, "low <= high"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio"),
        ({"mix": "cut"}, "one of none, mixup, cutmix, both"),
        ({"mix_alpha": 0.0}, "0 < mix_alpha <= 1"),
        ({"hflip": float("nan")}, "hflip = nan"),
    ],
)
def test_settings_out_of_range_are_named(settings, part):
    assert part in error_of(Augment, code=2, **settings)
