"""Augmentation: parameters drawn as often as they should be, applied as torchvision, Pillow and scipy would, masks on their pixels."""
import io
import json

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import Image, Mask

from bcos_nb.data import FrameDataset, forge_dataset, read_catalog
from bcos_nb.data.augment import (AUGMENTATIONS, TRIVIAL_OPERATIONS, Augmentation, RepeatedSampler, SeededFrames, adjust_colour, apply_weights, augment_batch,
                                  blur, compress, draw_parameters, make_augmentation, mix_batch, resize_weights, rotations, shift_principal, trivial_augment,
                                  trivial_strength, warp)
from bcos_nb.data.frames import Frames
from bcos_nb.models.detector import create_detector
from bcos_nb.training import FitConfig, cross_entropy, fit
from bcos_nb.training.loop import augmentation_of, load_state

GEOMETRY = dict(blur=0, colour=0, jpeg=0, erase=0, mix=0)  # what moves pixels, and nothing else
BILINEAR = v2.InterpolationMode.BILINEAR


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=seeded(seed))


def regions(count, height, width, seed=0):
    """Soft masks: a blob each, 0 to 1."""
    centre = 0.3 + 0.4 * torch.rand(count, 2, 1, 1, generator=seeded(seed))
    row, column = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    distance = ((row - centre[:, 0]) ** 2 + (column - centre[:, 1]) ** 2).sqrt()
    return ((0.3 - distance) * 20 + 0.5).clamp(0, 1)[:, None]


def drawn_of(name, count=20_000, **overrides):
    return draw_parameters(make_augmentation(name, **overrides), count, 60, 80, seeded())


def as_often_as(happened, probability, significance=1e-5):
    return stats.binomtest(int(happened.sum()), len(happened), probability).pvalue > significance


# ---- policies

def test_names_and_settings_are_known_or_refused_with_the_valid_ones():
    assert list(AUGMENTATIONS) == ["none", "crop_flip", "study", "bcos"]
    with pytest.raises(ValueError, match="none, crop_flip, study, bcos"):
        make_augmentation("sturdy")
    with pytest.raises(ValueError, match="has no setting flop.*jpeg_quality"):
        make_augmentation("study", flop=1)
    for wrong in (dict(flip=1.5), dict(jpeg_quality=(0, 50)), dict(jpeg_quality=(60, 40)), dict(blur_kernel=(3, 6)), dict(crop="middle"), dict(padding="wrap"),
                  dict(size=0), dict(colours=("sepia",)), dict(colours=()), dict(mix=1.0), dict(hue=0.6), dict(crop_area=(0, 1)), dict(degrees=-1)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*expected"):
            make_augmentation("study", **wrong)


def test_a_policy_is_data():
    policy = make_augmentation("study", rotate=0)
    assert policy == Augmentation(flip=0.5, blur=0.5, colour=0.5, jpeg=0.5) and hash(policy) == hash(make_augmentation("study", rotate=0))
    assert str(policy) == "flip 0.5, blur 0.5, colour 0.5, jpeg 0.5" and str(make_augmentation("none")) == "nothing"
    with pytest.raises(AttributeError):
        policy.flip = 1


# ---- what is drawn

def test_the_study_draws_each_step_as_often_as_deepfakebench():
    drawn = drawn_of("study")
    for happened in (drawn["flip"], drawn["degrees"] != 0, drawn["kernel"] > 0, drawn["quality"] > 0):
        assert as_often_as(happened, 0.5)
    light, axes, hue = drawn["contrast"] != 1, drawn["principal"] != 0, drawn["hue"] != 0
    assert all(as_often_as(happened, 1 / 6) for happened in (light, axes, hue)) and not (light & axes | axes & hue | light & hue).any()
    assert (drawn["operation"] == -1).all() and not drawn["erase"].any() and not drawn["paste"].any() and (drawn["own"] == 1).all()


def test_the_study_draws_evenly_from_its_ranges():
    drawn = drawn_of("study")
    assert stats.kstest(drawn["degrees"][drawn["degrees"] != 0], stats.uniform(-10, 20).cdf).pvalue > 1e-4
    assert stats.kstest(drawn["contrast"][drawn["contrast"] != 1], stats.uniform(0.9, 0.2).cdf).pvalue > 1e-4
    assert stats.kstest(drawn["hue"][drawn["hue"] != 0], stats.uniform(-1 / 9, 2 / 9).cdf).pvalue > 1e-4
    assert stats.kstest(drawn["principal"][drawn["principal"] != 0], stats.norm(0, 0.1).cdf).pvalue > 1e-4
    for name, values in (("kernel", [3, 5, 7]), ("quality", list(range(40, 101)))):
        found, counts = drawn[name][drawn[name] > 0].unique(return_counts=True)
        assert found.tolist() == values and stats.chisquare(counts).pvalue > 1e-4


def test_the_bcos_recipe_draws_what_torchvision_does():
    drawn = drawn_of("bcos")
    found, counts = drawn["operation"].unique(return_counts=True)
    assert found.tolist() == list(range(14)) and stats.chisquare(counts).pvalue > 1e-4
    assert as_often_as(drawn["erase"][:, 2] > 0, 0.1) and as_often_as(drawn["own"] < 1, 0.5)
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(60)
    theirs = [transform.make_params([torch.empty(3, 60, 80)]) for _ in range(2000)]
    for column, name in enumerate(("top", "left", "height", "width")):
        assert stats.ks_2samp(drawn["crop"][:, column], [params[name] for params in theirs]).pvalue > 1e-4
    transform, cut = v2.CutMix(num_classes=2), draw_parameters(make_augmentation("bcos", mixup_alpha=0), 20_000, 60, 80, seeded())["paste"]
    theirs = [1 - transform.make_params([torch.empty(3, 60, 80)])["lam_adjusted"] for _ in range(2000)]
    assert stats.ks_2samp(cut[:, 2] * cut[:, 3] / 4800, theirs).pvalue > 1e-4
    assert stats.kstest(draw_parameters(make_augmentation("bcos", cutmix_alpha=0), 20_000, 60, 80, seeded())["own"], stats.beta(0.2, 0.2).cdf).pvalue > 1e-4
    levels, counts = drawn["strength"][drawn["operation"] == TRIVIAL_OPERATIONS.index("Solarize")].mul(30).round().unique(return_counts=True)
    assert levels.tolist() == list(range(31)) and stats.chisquare(counts).pvalue > 1e-4


def test_batches_are_mixed_as_often_as_asked():
    for alpha, kinds in ((dict(mixup_alpha=1.0), (0.4, 0)), (dict(cutmix_alpha=1.0), (0, 0.4)), (dict(mixup_alpha=1.0, cutmix_alpha=1.0), (0.2, 0.2))):
        drawn = draw_parameters(make_augmentation("none", mix=0.4, **alpha), 20_000, 300, 300, seeded())
        mixed, pasted = drawn["own"] < 1, drawn["paste"][:, 2] > 1
        assert as_often_as(mixed, kinds[0]) and abs(float(pasted.double().mean()) - kinds[1]) < 0.015 and not (mixed & pasted).any()


def test_switching_a_step_off_leaves_the_others_draws():
    whole = drawn_of("study")
    for step, names in (("flip", {"flip"}), ("blur", {"kernel"}), ("jpeg", {"quality"}), ("colour", {"brightness", "contrast", "saturation", "hue", "principal"})):
        without = drawn_of("study", **{step: 0})
        assert {name for name in whole if not torch.equal(whole[name], without[name])} == names


# ---- steps against other libraries

@pytest.mark.parametrize("size", [(31, 46), (17, 90), (64, 64), (1, 1)])
def test_matrices_of_a_resized_crop_are_antialiased_interpolation(size):
    images = noise(5, 2, 31, 46)
    boxes = torch.tensor([[0, 0, 31, 46], [4, 7, 20, 11], [30, 45, 1, 1], [0, 20, 31, 3], [11, 0, 2, 46]])
    results = apply_weights(images, resize_weights(boxes[:, 0], boxes[:, 2], 31, size[0]), resize_weights(boxes[:, 1], boxes[:, 3], 46, size[1]))
    for image, box, result in zip(images, boxes.tolist(), results):
        assert torch.allclose(result, F.resized_crop(image, *box, list(size), antialias=True), atol=2e-6)


@pytest.mark.parametrize("padding, mode", [("reflection", "reflect"), ("border", "nearest"), ("zeros", None)])
def test_rotation_is_scipys(padding, mode):
    image, angles = noise(1, 1, 37, 52), torch.tensor([-10.0, 0.0, 4.5, 77.0])
    for angle, result in zip(angles.tolist(), warp(image.expand(4, 1, 37, 52), rotations(angles), padding)):
        if mode is None:
            expected = F.rotate(image[0], angle, interpolation=BILINEAR).numpy()
        else:
            sine, cosine = np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))
            turn, middle = np.array([[cosine, sine], [-sine, cosine]]), np.array([18.0, 25.5])
            expected = ndimage.affine_transform(image[0, 0].double().numpy(), turn, middle - turn @ middle, order=1, mode=mode)
        assert np.abs(result.numpy() - expected).max() < 2e-5


def test_rotation_is_pillows():
    picture = (ndimage.gaussian_filter(np.random.default_rng(0).random((50, 60, 3)), (2, 2, 0)) * 255).astype(np.uint8)
    image = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
    theirs = np.asarray(PIL.Image.fromarray(picture).rotate(8, PIL.Image.Resampling.BILINEAR)).astype(int)
    ours = warp(image, rotations(torch.tensor([8.0])), "zeros")[0].mul(255).round().permute(1, 2, 0).numpy()
    assert np.abs(ours - theirs)[8:-8, 8:-8].max() <= 1


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_image_gets_its_own_factor(name):
    images, values = noise(6, 3, 13, 9), torch.linspace(-0.5, 0.5, 6) if name == "hue" else torch.linspace(0, 2, 6)
    images[0] = images[0, :1]
    expected = torch.stack([getattr(F, f"adjust_{name}")(image, value) for image, value in zip(images, values.tolist())])
    assert torch.allclose(adjust_colour(images, **{name: values}), expected, atol=1e-5)


def test_principal_colours_are_numpys():
    images = 0.3 + 0.4 * noise(3, 3, 12, 15) * torch.tensor([1.0, 0.6, 0.3])[:, None, None]
    for image, strength, result in zip(images, (0.3, -0.2, 0.0), shift_principal(images, torch.tensor([0.3, -0.2, 0.0]))):
        variances, axes = np.linalg.eigh(np.cov(image.flatten(1).double().numpy()))
        shift = strength * sum(v * a * np.sign(a.sum()) for v, a in zip(variances, axes.T))
        assert np.abs((result - image).numpy() - shift[:, None, None]).max() < 1e-6
    grey = torch.full((1, 3, 4, 4), 0.5)
    assert torch.equal(shift_principal(grey, torch.ones(1)), grey)


def test_blur_is_torchvisions_with_a_kernel_of_its_own_for_each_image():
    images, kernel = noise(5, 3, 21, 18), torch.tensor([3, 1, 7, 5, 9])
    results = blur(images, kernel)
    for image, side, result in zip(images, kernel.tolist(), results):
        assert torch.allclose(result, F.gaussian_blur(image, [side, side]), atol=1e-6)
    assert torch.equal(results[1], images[1])
    with pytest.raises(ValueError, match="smaller blur_kernel"):
        blur(noise(1, 3, 3, 30), torch.tensor([7]))


@pytest.mark.parametrize("quality", [40, 73, 100])
def test_jpeg_is_pillows(quality):
    picture = (ndimage.gaussian_filter(np.random.default_rng(0).random((33, 47, 3)), (2, 2, 0)) * 255).round().astype(np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(picture).save(file, "jpeg", quality=quality)
    image = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
    assert np.array_equal(compress(image, torch.tensor([quality]))[0].mul(255).round().permute(1, 2, 0).numpy(), np.asarray(PIL.Image.open(file)))


@pytest.mark.parametrize("name", TRIVIAL_OPERATIONS)
def test_trivial_augment_is_torchvisions(name):
    reference = v2.TrivialAugmentWide()
    function, signed = reference._AUGMENTATION_SPACE[name]
    magnitudes, images = function(31, 29, 40), noise(3, 3, 29, 40)
    levels, negative = torch.tensor([3, 16, 30]), torch.tensor([True, False, True])
    operation = torch.full((3,), TRIVIAL_OPERATIONS.index(name))
    strength = trivial_strength(operation, levels, negative)
    for image, level, minus, value, result in zip(images, levels.tolist(), negative.tolist(), strength.tolist(), trivial_augment(images, operation, strength)):
        magnitude = 0.0 if magnitudes is None else float(magnitudes[level]) * (-1 if signed and minus else 1)
        assert value == pytest.approx(magnitude, abs=1e-5)
        theirs = reference._apply_image_or_video_transform(image, name, magnitude, BILINEAR, {torch.Tensor: None})
        assert float(((result - theirs).abs() > 2e-5).float().mean()) < 2e-3


def test_nothing_is_nothing_to_the_bit():
    images = torch.randint(0, 256, (3, 3, 17, 23), dtype=torch.uint8, generator=seeded())
    masks = torch.randint(0, 256, (3, 1, 17, 23), dtype=torch.uint8, generator=seeded(1))
    out = augment_batch(images, masks, torch.tensor([0, 1, 1]), make_augmentation("none"))
    assert torch.equal(out[0], images) and torch.equal(out[1], masks) and out[2].tolist() == [0, 1, 1]
    out = augment_batch(images, masks, None, make_augmentation("none", flip=1))
    assert torch.equal(out[0], images.flip(-1)) and torch.equal(out[1], masks.flip(-1)) and out[2] is None


# ---- whole policies

@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(name=st.sampled_from(["crop_flip", "study", "bcos"]), count=st.integers(1, 5), height=st.integers(9, 41), width=st.integers(9, 41),
       size=st.sampled_from([None, 8, 9]), whole=st.booleans(), seed=st.integers(0, 10**6))
def test_any_size_any_type_stays_in_range_and_keeps_its_form(name, count, height, width, size, whole, seed):
    policy = make_augmentation(name, size=size, erase=0.5)
    images, masks = noise(count, 3, height, width, seed=seed), regions(count, height, width, seed)
    if whole:
        images, masks = images.mul(255).round().to(torch.uint8), masks.mul(255).round().to(torch.uint8)
    before = images.clone(), masks.clone()
    out, out_masks, labels = augment_batch(images, masks, torch.arange(count) % 2, policy, seeded(seed))
    side = (size, size) if size else (min(height, width),) * 2 if name == "crop_flip" else (height, width)
    assert out.shape == (count, 3, *side) and out_masks.shape == (count, 1, *side) and out.dtype == images.dtype and out_masks.dtype == masks.dtype
    top = 255 if whole else 1
    assert 0 <= out.min() and out.max() <= top and 0 <= out_masks.min() and out_masks.max() <= top and torch.isfinite(out.float()).all()
    assert torch.equal(images, before[0]) and torch.equal(masks, before[1])  # the input is left alone
    if name == "bcos":
        assert labels.shape == (count, 2) and torch.allclose(labels.sum(1), torch.ones(count))
    else:
        assert labels.tolist() == [k % 2 for k in range(count)]


@pytest.mark.parametrize("name, overrides", [("crop_flip", dict(size=20)), ("study", dict(degrees=60)), ("study", dict(size=23, crop="resized")), ("bcos", {}),
                                             ("bcos", dict(size=48, padding="border"))])
def test_a_mask_painted_into_the_image_is_still_the_mask(name, overrides):
    masks = regions(40, 30, 37)
    policy = make_augmentation(name, **GEOMETRY | overrides)
    drawn = draw_parameters(policy, 40, 30, 37, seeded(3))
    painted, out_masks, _ = augment_batch(masks.expand(40, 3, 30, 37).contiguous(), masks, None, policy, seeded(3))
    moves = torch.isin(drawn["operation"], torch.tensor([-1, 0, 1, 2, 3, 4, 5]))  # the other operations change light, which a mask has none of
    assert moves.sum() > 10 and torch.allclose(painted[moves], out_masks[moves].expand_as(painted[moves]), atol=1e-6)
    assert not torch.equal(out_masks, masks) and out_masks.amax((1, 2, 3)).min() >= 0


def test_light_leaves_the_mask_alone_and_erasing_takes_it_away():
    images, masks = noise(30, 3, 20, 24).clamp(min=0.2), regions(30, 20, 24)
    out, out_masks, _ = augment_batch(images, masks, None, make_augmentation("study", flip=0, rotate=0, blur=1, colour=1, jpeg=1), seeded())
    assert torch.equal(out_masks, masks) and (out != images).flatten(1).any(1).all()
    out, out_masks, _ = augment_batch(images, masks, None, make_augmentation("none", erase=1), seeded())
    gone = (out == 0).all(1, keepdim=True)
    assert gone.flatten(1).any(1).all() and torch.equal(out_masks, masks.masked_fill(gone, 0)) and torch.equal(out, images.masked_fill(gone, 0))


@pytest.mark.parametrize("name", list(AUGMENTATIONS))
def test_pairs_share_geometry_and_photometry(name):
    images, masks = noise(6, 3, 24, 28).repeat(2, 1, 1, 1), regions(6, 24, 28).repeat(2, 1, 1, 1)
    labels = torch.tensor([1] * 6 + [0] * 6)
    out, out_masks, shares = augment_batch(images, masks, labels, make_augmentation(name), seeded(), share=2)
    assert torch.equal(out[:6], out[6:]) and torch.equal(out_masks[:6], out_masks[6:])
    assert torch.equal(shares.argmax(1) if shares.ndim == 2 else shares, labels) and (shares.ndim == 1 or torch.equal(shares.amax(1), torch.ones(12)))
    if name != "none":
        apart, _, _ = augment_batch(images, masks, labels, make_augmentation(name), seeded())
        assert not torch.equal(apart[:6], apart[6:])
    with pytest.raises(ValueError, match="share=5"):
        augment_batch(images, masks, labels, make_augmentation(name), seeded(), share=5)


@pytest.mark.parametrize("name", ["crop_flip", "study", "bcos"])
def test_a_generator_fixes_everything_and_another_seed_changes_it(name):
    images, labels, policy = noise(8, 3, 24, 24), torch.arange(8) % 2, make_augmentation(name)
    torch.manual_seed(0)
    first = policy.batch(images, None, labels, seeded(1))
    torch.manual_seed(1)
    second, third = policy.batch(images, None, labels, seeded(1)), policy.batch(images, None, labels, seeded(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[2], second[2]) and not torch.equal(first[0], third[0])
    torch.manual_seed(7)
    default = policy.batch(images, None, labels)
    torch.manual_seed(7)
    assert torch.equal(default[0], policy.batch(images, None, labels)[0])


def test_wrong_input_is_refused_with_what_is_expected():
    policy = make_augmentation("study")
    for images, masks, said in ((noise(3, 8, 8), None, r"\[N, 3, H, W\]"), (noise(2, 6, 8, 8), None, r"\[N, 3, H, W\]"),
                                (noise(2, 3, 8, 8), noise(2, 1, 8, 9), "Masks of shape"), (noise(2, 3, 8, 8) * torch.nan, None, "from nan to nan"),
                                (noise(2, 3, 8, 8) * 4 - 2, None, "expected \\[0, 1\\]"), (noise(2, 3, 8, 8).long(), None, "uint8 or floats")):
        with pytest.raises(ValueError, match=said):
            augment_batch(images, masks, None, policy, seeded())
    with pytest.raises(ValueError, match="size=9 does not fit"):
        augment_batch(noise(2, 3, 8, 12), None, None, make_augmentation("crop_flip", size=9), seeded())


def test_an_empty_batch_is_an_empty_batch():
    for name in AUGMENTATIONS:
        nothing = torch.empty(0, 3, 12, 12), torch.empty(0, 1, 12, 12), torch.empty(0, dtype=torch.long)
        images, masks, labels = augment_batch(*nothing, make_augmentation(name), seeded())
        assert images.shape == (0, 3, 12, 12) and masks.shape == (0, 1, 12, 12) and len(labels) == 0


# ---- CutMix and MixUp

def mixed(alpha, count=16, height=19, width=31, share=1):
    """A batch whose pixels and masks say which image they came from, mixed."""
    policy = make_augmentation("none", mix=1.0, **alpha)
    labels = torch.arange(count) % 2
    colour = labels.float()[:, None, None, None]
    return labels, *augment_batch(colour.expand(-1, 3, height, width), colour.expand(-1, 1, height, width), labels, policy, seeded(4), share=share)


@pytest.mark.parametrize("alpha", [dict(mixup_alpha=0.2), dict(mixup_alpha=1.0), dict(cutmix_alpha=1.0), dict(mixup_alpha=0.2, cutmix_alpha=1.0)])
def test_labels_are_the_share_of_pixels_and_masks_are_mixed_alike(alpha):
    labels, images, masks, shares = mixed(alpha)
    assert torch.allclose(images.double().mean((1, 2, 3)).float(), shares[:, 1], atol=1e-5) and torch.allclose(shares.sum(1), torch.ones(16))
    assert torch.allclose(masks.expand_as(images), images) and 0.05 < (shares[:, 1] - labels).abs().max() <= 1
    if alpha == dict(cutmix_alpha=1.0):
        counted = torch.stack([(images[:, 0] == value).flatten(1).sum(1) for value in (0, 1)], 1) / (19 * 31)
        assert set(images.unique().tolist()) == {0.0, 1.0} and torch.allclose(counted, shares, atol=1e-6)


def test_mixtures_are_torchvisions():
    images, labels = noise(5, 3, 14, 22), torch.tensor([1, 0, 0, 1, 1])
    ours, shares = mix_batch(images, labels, torch.zeros(5, 4, dtype=torch.long), torch.full((5,), 0.35))
    parameters = dict(labels=labels, batch_size=5, lam=0.35)
    assert torch.allclose(ours, v2.MixUp(num_classes=2).transform(images, parameters), atol=1e-6)
    assert torch.allclose(shares, v2.MixUp(num_classes=2).transform(labels, parameters), atol=1e-6)
    ours, shares = mix_batch(images, labels, torch.tensor([[3, 4, 10, 11]]).expand(5, 4), torch.ones(5))
    parameters = dict(labels=labels, batch_size=5, box=(4, 3, 15, 13), lam_adjusted=1 - 110 / 308)
    assert torch.equal(ours, v2.CutMix(num_classes=2).transform(images, parameters))
    assert torch.allclose(shares, v2.CutMix(num_classes=2).transform(labels, parameters), atol=1e-6)


def test_one_image_is_mixed_with_itself():
    image, mask = noise(1, 3, 15, 15), regions(1, 15, 15)
    out, out_mask, shares = augment_batch(image, mask, torch.tensor([1]), make_augmentation("none", mix=1, mixup_alpha=1, cutmix_alpha=1), seeded())
    assert torch.allclose(out, image) and torch.allclose(out_mask, mask) and shares.tolist() == [[0, 1]]


def test_shares_are_mixed_on():
    """What has been mixed once, as shares [N, 2], may be mixed again."""
    shares = torch.tensor([[0.2, 0.8], [1.0, 0.0]])
    _, again = mix_batch(noise(2, 3, 8, 8), shares, torch.zeros(2, 4, dtype=torch.long), torch.tensor([0.5, 0.25]))
    assert torch.allclose(again, torch.tensor([[0.6, 0.4], [0.4, 0.6]]))


# ---- loaders

class Rows(Dataset):
    """Random pictures and masks, augmented as `FrameDataset` does."""

    def __init__(self, augment, count=6):
        self.images = (noise(count, 3, 25, 33) * 255).to(torch.uint8)
        self.masks = (regions(count, 25, 33) * 255).to(torch.uint8)
        self.augment = augment

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        image, mask = self.augment(Image(self.images[row]), Mask(self.masks[row]))
        return dict(image=image.as_subclass(torch.Tensor), mask=mask.as_subclass(torch.Tensor), row=row)


def read(dataset, workers, sampler=None):
    batches = list(DataLoader(dataset, batch_size=2, num_workers=workers, sampler=sampler))
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


@pytest.mark.parametrize("name", ["study", "bcos"])
def test_workers_change_nothing(name):
    dataset = SeededFrames(Rows(make_augmentation(name)), seed=3)
    sampler = RepeatedSampler(dataset, 2, seed=1)
    alone = read(dataset, 0, sampler)
    torch.manual_seed(99)  # the workers' own seeds come from here, and must not matter
    together = read(dataset, 2, sampler)
    assert all(torch.equal(alone[key], together[key]) for key in alone)
    other = read(SeededFrames(Rows(make_augmentation(name)), seed=4), 0, sampler)
    assert torch.equal(alone["row"], other["row"]) and not torch.equal(alone["image"], other["image"])
    sampler.set_epoch(1)
    later = read(dataset, 0, sampler)
    assert {row: [int(image.sum()) for image, r in zip(later["image"], later["row"]) if r == row] for row in range(6)} != \
        {row: [int(image.sum()) for image, r in zip(alone["image"], alone["row"]) if r == row] for row in range(6)}


def test_seeding_a_frame_leaves_the_default_generator_alone():
    dataset, state = SeededFrames(Rows(make_augmentation("study"))), torch.random.get_rng_state()
    first = dataset[2]["image"]
    assert torch.equal(torch.random.get_rng_state(), state) and torch.equal(first, dataset[2]["image"]) and not torch.equal(first, dataset[2 + 6]["image"])
    assert len(list(dataset)) == 6
    with pytest.raises(IndexError):
        dataset[-1]


def test_single_frames_keep_type_and_form_and_may_come_without_mask():
    torch.manual_seed(0)
    for name in AUGMENTATIONS:
        policy = make_augmentation(name, size=16)
        image, mask = policy(Image(torch.randint(0, 256, (3, 21, 18), dtype=torch.uint8)), Mask(torch.zeros(1, 21, 18, dtype=torch.uint8)))
        assert type(image) is Image and type(mask) is Mask and image.shape == (3, 16, 16) and mask.shape == (1, 16, 16) and image.dtype == mask.dtype == torch.uint8
        image, mask = policy(Image(noise(3, 21, 18)), None)
        assert mask is None and image.dtype == torch.float32 and 0 <= image.min() and image.max() <= 1


@pytest.mark.parametrize("count, repetitions, processes", [(10, 4, 1), (10, 4, 4), (7, 3, 2), (5, 1, 3), (1, 2, 1)])
def test_every_row_comes_as_often_as_asked_whatever_the_processes(count, repetitions, processes):
    for dataset, rows in ((range(count), lambda i: i), (SeededFrames(range(count)), lambda i: i % count)):
        samplers = [RepeatedSampler(dataset, repetitions, seed=2, rank=rank, processes=processes) for rank in range(processes)]
        parts = [list(sampler) for sampler in samplers]
        assert {len(part) for part in parts} == {len(samplers[0])} == {-(-count * repetitions // processes)} and parts == [list(sampler) for sampler in samplers]
        dealt = [part[k] for k in range(len(parts[0])) for part in parts]
        assert sorted(map(rows, dealt[: count * repetitions])) == sorted(list(range(count)) * repetitions)
        assert dealt[count * repetitions :] == dealt[: len(dealt) - count * repetitions]
        for sampler in samplers:
            sampler.set_epoch(1)
        later = [index for sampler in samplers for index in sampler]
        if isinstance(dataset, SeededFrames):
            assert len(set(dealt)) == count * repetitions and not set(dealt) & set(later)  # no draw comes twice, in no epoch
        if count > 4:
            assert later != [index for part in parts for index in part]


def test_impossible_ranks_are_refused():
    for wrong in (dict(repetitions=0), dict(rank=2, processes=2), dict(rank=-1)):
        with pytest.raises(ValueError, match="repetitions=.*rank="):
            RepeatedSampler(range(4), **wrong)


def test_frame_dataset_with_a_policy(tmp_path):
    root = forge_dataset(tmp_path / "mini", workers=0, identities=6, frames_per_video=1, size=48, compressions=("c23",), methods=("FaceSwap",), progress=False)
    catalog = read_catalog(root, split="train")
    plain = FrameDataset(catalog, 48, with_mask=True)
    mirrored = FrameDataset(catalog, 48, with_mask=True, augment=make_augmentation("none", flip=1))
    for one, other in zip((plain[k] for k in range(len(plain))), (mirrored[k] for k in range(len(plain)))):
        assert torch.equal(one["image"].flip(-1), other["image"]) and torch.equal(one["mask"].flip(-1), other["mask"])
    study = SeededFrames(FrameDataset(catalog, 48, with_mask=True, augment=make_augmentation("study")), seed=1)
    assert study.catalog.equals(catalog.reset_index(drop=True)) and all(torch.equal(study[k]["image"], study[k]["image"]) for k in range(3))
    assert all(0 <= item["image"].min() and item["image"].max() <= 1 for item in study)


# ---- training

def toy(count, seed):
    """Noise with a source for every fake."""
    images = torch.randint(60, 190, (count, 3, 32, 32), generator=seeded(seed), dtype=torch.uint8)
    labels = torch.arange(count) % 2
    images[labels == 1, :, 4:20, 4:20:4] = images[labels == 1, :, 4:20, 4:20:4] // 2 + 100
    sources = [str(k - 1) if k % 2 else None for k in range(count)]
    catalog = pd.DataFrame(dict(frame=[str(k) for k in range(count)], mask=None, video="v", label=labels.numpy(), method="m", source_frame=sources))
    return Frames(images, None, labels, ["v"] * count, catalog)


@pytest.mark.parametrize("augment, balance", [("study", "pairs"), ("bcos", "weight")])
def test_training_with_a_policy_resumes_bit_for_bit(augment, balance, tmp_path):
    class CutOff(Exception):
        pass

    def cut_off(text, share):
        if text.startswith("epoch 2/2"):
            raise CutOff

    config = FitConfig(epochs=2, batch_size=16, augment=augment, balance=balance, crop=24)
    detectors = []
    for name in ("whole", "cut"):
        torch.manual_seed(0)
        detectors.append(create_detector("resnet34", b=2, width=0.125))
        if name == "cut":
            with pytest.raises(CutOff):
                fit(detectors[-1], toy(32, 0), toy(16, 1), config, tmp_path / name, progress=False, on_progress=cut_off)
            torch.manual_seed(0)
            detectors[-1] = create_detector("resnet34", b=2, width=0.125)
        history = fit(detectors[-1], toy(32, 0), toy(16, 1), config, tmp_path / name, progress=False)
        assert np.isfinite(history["train_loss"]).all()
    assert all(torch.equal(a, b) for a, b in zip(detectors[0].state_dict().values(), detectors[1].state_dict().values()))
    with pytest.raises(ValueError, match=f"augment '{augment}' → 'none'"):
        fit(detectors[0], toy(32, 0), toy(16, 1), FitConfig(epochs=2, batch_size=16, augment="none", balance=balance, crop=24), tmp_path / "whole", progress=False)


def test_a_state_from_before_there_was_a_choice_is_the_default_one(tmp_path):
    settings = dict(epochs=2, augment="crop_flip")
    torch.save(dict(settings=json.dumps(dict(epochs=2)), epoch=1), tmp_path / "last.pt")
    assert load_state(tmp_path / "last.pt", json.dumps(settings))["epoch"] == 1
    with pytest.raises(ValueError, match="augment 'crop_flip' → 'study'"):
        load_state(tmp_path / "last.pt", json.dumps(settings | dict(augment="study")))


def test_config_names_a_policy_and_cuts_it():
    with pytest.raises(ValueError, match="none, crop_flip, study, bcos"):
        FitConfig(augment="all")
    assert augmentation_of(FitConfig(augment="study", crop=24)) == make_augmentation("study", crop="random", size=24)
    assert augmentation_of(FitConfig(augment="bcos", crop=24, flip=False)) == make_augmentation("bcos", size=24, flip=0)
    assert augmentation_of(FitConfig(augment="study")) == make_augmentation("study")


def test_shares_cost_what_their_classes_cost():
    logits, labels, weights = torch.randn(9, 2, generator=seeded()), torch.arange(9) % 2, torch.tensor([2.5, 0.625])
    assert torch.isclose(cross_entropy(logits, torch.nn.functional.one_hot(labels, 2).float(), weights), cross_entropy(logits, labels, weights))
    expected = -(torch.tensor([0.3, 0.7]) * weights * logits.log_softmax(1)).sum(1).mean()
    assert torch.isclose(cross_entropy(logits, torch.tensor([[0.3, 0.7]]).expand(9, 2), weights), expected)
