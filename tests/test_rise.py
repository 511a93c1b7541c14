"""RISE against its equation written out in NumPy, and against detectors of which it is known where they look."""
import numpy as np
import pytest
import torch
from torch import nn

from bcos_nb.explainers import explain
from bcos_nb.explainers.rise import draw_grids, soft_masks
from bcos_nb.models import create_detector


def literal_mask(grid, shift, height, width):
    """Section 3.2 of the paper, pixel by pixel: bilinear between the centres of cells, from an enlargement by one more cell a side."""
    cells, out = len(grid), np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            ends = []
            for pixel, length, share in ((y, height, shift[0]), (x, width, shift[1])):
                cell = int(np.ceil(length / cells))
                place = (pixel + int(share * cell) + 0.5) * cells / ((cells + 1) * cell) - 0.5
                low = int(np.clip(np.floor(place), 0, cells - 1))
                ends.append((low, min(low + 1, cells - 1), np.clip(place - low, 0, 1)))
            (top, bottom, down), (left, right, across) = ends
            out[y, x] = (grid[top, left] * (1 - across) + grid[top, right] * across) * (1 - down) + (grid[bottom, left] * (1 - across) + grid[bottom, right] * across) * down
    return out


def literal_rise(probability_of, image, grids, shifts, p, baseline=0.0):
    """Equation (6), one mask at a time, in float64; image [3, H, W]."""
    total = np.zeros(image.shape[1:])
    for grid, shift in zip(grids, shifts):
        mask = literal_mask(grid, shift, *image.shape[1:])
        total += probability_of(image * mask + baseline * (1 - mask)) * mask
    return total / (p * len(grids))


class Patch(nn.Module):
    """p(fake) is the mean of one patch."""

    def __init__(self, top=6, left=20, side=8):
        super().__init__()
        self.rows, self.columns = slice(top, top + side), slice(left, left + side)

    def forward(self, images):
        share = images[:, :, self.rows, self.columns].mean((1, 2, 3)).clamp(1e-9, 1 - 1e-9)
        return torch.stack([(1 - share).log(), share.log()], 1)


@pytest.mark.parametrize("size,cells", [((21, 14), 7), ((20, 33), 7), ((16, 16), 8), ((9, 10), 2)])
def test_masks_are_those_of_the_paper(size, cells):
    grids, shifts = draw_grids(5, cells, 0.5, seed=3)
    shifts[0], shifts[1] = 0.0, 0.9999
    masks = soft_masks(grids, shifts.double(), size)
    assert masks.dtype == torch.float64 and masks.shape == (5, *size)
    for grid, shift, mask in zip(grids.double().numpy(), shifts.double().numpy(), masks.numpy()):
        assert np.abs(literal_mask(grid, shift, *size) - mask).max() < 1e-12


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.8])
def test_every_pixel_shows_with_the_probability_of_a_cell(probability):
    grids, shifts = draw_grids(20_000, 7, probability, seed=0)
    masks = soft_masks(grids, shifts, (15, 18))
    assert masks.min() >= 0 and masks.max() <= 1 + 1e-6
    assert (masks.mean(0) - probability).abs().max() < 5 * (probability * (1 - probability) / 20_000) ** 0.5
    assert shifts.min() >= 0 and shifts.max() < 1 and (shifts.mean(0) - 0.5).abs().max() < 0.01
    assert grids.float().mean((1, 2)).std() > 0 and not torch.equal(grids[0], grids[1])


@pytest.mark.parametrize("baseline", [0.0, 0.5])
def test_the_sum_is_equation_6(baseline):
    torch.manual_seed(0)
    detector = create_detector("resnet10", b=2, width=0.125).eval().double()
    images, target = torch.rand(2, 3, 20, 24, dtype=torch.float64), torch.tensor([1, 0])
    grids, shifts = draw_grids(15, 4, 0.4, seed=7)
    answer = explain(detector, images, "rise", target, samples=15, cells=4, probability=0.4, seed=7, baselines=baseline, batch_size=4)
    assert answer.contributions.dtype == torch.float64
    for n in range(2):
        def probability_of(seen):
            with torch.no_grad():
                return float(detector(torch.from_numpy(seen)[None]).softmax(1)[0, target[n]])

        literal = literal_rise(probability_of, images[n].numpy(), grids.double().numpy(), shifts.double().numpy(), 0.4, baseline)
        assert np.abs(answer.contributions[n].numpy() - literal).max() < 1e-12
        assert np.abs(answer.maps[n].numpy() - (literal - literal.min()) / (literal.max() - literal.min())).max() < 1e-5


@pytest.mark.parametrize("top,left", [(6, 20), (24, 2), (12, 12)])
def test_a_patch_is_found(top, left):
    bright = torch.full((1, 3, 40, 40), 0.95)
    answer = explain(Patch(top, left), bright, "rise", samples=3000)
    y, x = divmod(int(answer.maps[0].argmax()), 40)
    assert top - 1 <= y <= top + 8 and left - 1 <= x <= left + 8
    inside = answer.maps[0, top : top + 8, left : left + 8].mean()
    assert inside > 0.75 and inside > 2 * answer.maps[0].mean()
    real = explain(Patch(top, left), bright, "rise", 0, samples=3000)  # what makes it real is that the patch is hidden
    assert real.maps[0, top : top + 8, left : left + 8].mean() < 0.25


def test_far_from_the_patch_the_sum_is_the_mean_score():
    bright = torch.full((1, 3, 64, 64), 0.9)
    answer = explain(Patch(4, 4), bright, "rise", samples=8000)
    assert answer.contributions[0, 40:, 40:].mean().item() == pytest.approx(0.9 * 0.5, abs=0.01)  # independent of the mask there: E[f]


def test_neither_batches_nor_neighbours_nor_the_global_generator_matter():
    torch.manual_seed(0)
    detector, images, target = create_detector("resnet10", width=0.125).eval(), torch.rand(3, 3, 32, 32), torch.tensor([1, 0, 1])
    sizes = []
    before = torch.get_rng_state()
    usual = explain(detector, images, "rise", target, samples=40)
    assert torch.equal(torch.get_rng_state(), before)
    detector.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    for size in (1, 2, 7):
        sizes.clear()
        other = explain(detector, images, "rise", target, samples=40, batch_size=size)
        assert torch.allclose(other.contributions, usual.contributions, atol=1e-6) and max(sizes[:-1]) <= size
    assert torch.allclose(explain(detector, images[1:2], "rise", 0, samples=40).maps[0], usual.maps[1], atol=1e-4)
    assert not torch.allclose(explain(detector, images, "rise", target, samples=40, seed=1).maps, usual.maps, atol=0.05)


def test_a_detector_that_always_says_the_same_has_the_coverage_for_a_sum():
    class Certain(nn.Module):
        def forward(self, images):
            return torch.tensor([[-40.0, 40.0]]).repeat(len(images), 1)

    answer = explain(Certain(), torch.rand(1, 3, 16, 16), "rise", samples=60, cells=4)
    coverage = soft_masks(*draw_grids(60, 4, 0.5, seed=0), (16, 16)).mean(0) / 0.5
    assert torch.allclose(answer.contributions[0], coverage, atol=1e-6)
    nothing = explain(Certain(), torch.rand(1, 3, 16, 16), "rise", 0, samples=60, cells=4)
    assert nothing.maps.abs().max() == 0 or nothing.contributions.max() < 1e-30


@pytest.mark.parametrize("arch,b,options", [("resnet10", None, {}), ("resnet10", 2, {}), ("vitc_ti", None, dict(depth=1, image_size=32)), ("vitc_ti", 2, dict(depth=1, image_size=32))])
def test_every_kind_of_detector_is_served(arch, b, options):
    torch.manual_seed(0)
    answer = explain(create_detector(arch, b=b, width=0.125, **options), torch.rand(2, 3, 32, 32), "rise", samples=20)
    assert answer.maps.shape == (2, 32, 32) and answer.maps.dtype == torch.float32
    assert torch.equal(answer.maps.amin((1, 2)), torch.zeros(2)) and torch.allclose(answer.maps.amax((1, 2)), torch.ones(2), atol=1e-6)


@pytest.mark.parametrize("options,words", [
    (dict(samples=0), "samples must be"), (dict(cells=1), "cells must be"), (dict(batch_size=0), "batch_size must be"),
    (dict(probability=0.0), "probability=0.0"), (dict(probability=1.0), "probability=1.0"), (dict(baselines=2), "baselines=2"),
])
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        explain(Patch(), torch.rand(1, 3, 40, 40), "rise", **options)
