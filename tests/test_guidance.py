import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn as nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from bcos_nb.data import FrameDataset, Frames
from bcos_nb.games import localization_scores
from bcos_nb.layers import dynamic_linear, evaluating, explanation_mode
from bcos_nb.models import create_detector
from bcos_nb.models.bcosify import bcosify
from bcos_nb.training.guidance import energy_outside, guidance_loss, input_times_gradient, inside_share, logits_along, outside_share

KINDS = {
    "resnet": dict(arch="resnet10", b=2, width=0.125, stem="fine"),
    "resnet-plain": dict(arch="resnet10", b=1.75, width=0.125, stem="fine", max_out=1, unit_norm=False, norm="BatchNorm2d", norm_bias=True),
    "resnet-image-norm": dict(arch="resnet10", b=2.5, width=0.125, stem="fine", norm="DetachableGroupNorm2d", norm_bias=True, logit_bias=-1.0),
    "resnet-b1": dict(arch="resnet10", b=1, width=0.125, stem="fine"),
    "xception": dict(arch="xception", b=2, width=0.0625, middle=1, stem="fine"),
    "vitc": dict(arch="vitc_ti", b=2, width=0.1, depth=2, stem="fine", image_size=32),
    "convnext": dict(arch="convnext_tiny", b=1.5, width=0.1),
    "bcosified": None,
    "ordinary": dict(arch="resnet10", width=0.125),
    "ordinary-vitc": dict(arch="vitc_ti", width=0.1, depth=2, stem="fine", image_size=32),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")


def made(kind, dtype=torch.float64):
    """A small detector that has seen a batch, and three images with masks."""
    torch.manual_seed(0)
    images, masks = torch.rand(3, 3, 32, 32, dtype=dtype), (torch.rand(3, 1, 32, 32) > 0.7).to(dtype)
    if kind == "bcosified":  # keeps GELU and constants, which are gates of x and no B-cos layers
        detector = bcosify(create_detector("vitc_ti", width=0.1, depth=2, stem="fine", image_size=32), 1.5)
    else:
        detector = create_detector(**KINDS[kind])
    detector = detector.to(dtype).train()
    with torch.no_grad():
        detector(images)
    return detector, images, masks


def contributions_of(detector, images):
    """Signed contributions to the logit of fake, without graph."""
    if detector.is_bcos:
        return dynamic_linear(detector, images).contributions
    return input_times_gradient(detector, images, keep_graph=False)


def gradient(detector, value):
    parameters = list(detector.parameters())
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, torch.autograd.grad(value, parameters, allow_unused=True))]


# the share ------------------------------------------------------------------------------------------------------------
def test_the_share_is_the_quotient_of_the_paper():
    rng = np.random.default_rng(0)
    contributions, masks = rng.normal(size=(6, 7, 5)), rng.random((6, 7, 5))
    expected = [1 - (m * c)[c > 0].sum() / c[c > 0].sum() for c, m in zip(contributions, masks)]
    assert np.allclose(energy_outside(torch.from_numpy(contributions), torch.from_numpy(masks)), expected, rtol=1e-12)


def test_the_share_is_the_rest_of_the_localization_score():
    generator = torch.Generator().manual_seed(0)
    contributions, regions = torch.randn(8, 12, 12, generator=generator), torch.rand(8, 12, 12, generator=generator) > 0.6
    maps = contributions.clamp(min=0)
    score = localization_scores(maps / maps.amax((1, 2), keepdim=True), regions, [0.0])["weighted"][0]
    assert torch.allclose(1 - energy_outside(contributions, regions), score, atol=1e-6)


@pytest.mark.parametrize("against", [0, 1e-30, 1e3, 1e20])
def test_a_map_that_speaks_for_nothing_is_outside_and_harmless(against):
    contributions = torch.full((1, 4, 4), -float(against)).requires_grad_()
    share = energy_outside(contributions, torch.ones(1, 4, 4))
    share.sum().backward()
    assert share == 1 and bool((contributions.grad == 0).all())


def test_slopes_stay_bounded_where_almost_nothing_is_positive():
    contributions = torch.full((1, 4, 4), -1.0)
    contributions[0, 0, :2] = torch.tensor([1e-12, 3e-12])
    contributions.requires_grad_()
    masks = torch.zeros(1, 4, 4)
    masks[0, 0, 0] = 1
    share = energy_outside(contributions, masks)
    share.sum().backward()
    assert 0 <= share <= 1 and float(contributions.grad.abs().max()) <= 1e3  # one over the floor, with contributions of 1


# the linear map and its gradient --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("ordinary")])
def test_the_answer_to_a_direction_is_that_of_the_linear_map(kind):
    detector, images, _ = made(kind)
    linear = dynamic_linear(detector, images, torch.tensor([1, 0, 1]))
    directions = torch.randn_like(linear.encoded)
    along = logits_along(detector, linear.encoded, directions, torch.tensor([1, 0, 1]))
    assert torch.allclose(along, (linear.weights * directions).flatten(1).sum(1), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_finite_differences(kind):
    detector, images, masks = made(kind)
    share = outside_share(detector, images, masks)
    exact = gradient(detector, share.sum())
    parameters, step = list(detector.parameters()), 1e-8  # W(x) jumps where another filter of a MaxOut unit wins: a step so small seldom meets that
    for seed in range(3):
        generator, values = torch.Generator().manual_seed(seed), []
        along = [torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.detach().abs().mean() for p in parameters]
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters, along):
                    p.add_(d, alpha=sign * step)
            values.append(float(energy_outside(contributions_of(detector, images), masks[:, 0]).sum()))
            with torch.no_grad():
                for p, d in zip(parameters, along):
                    p.sub_(d, alpha=sign * step)
        slope, found = (values[0] - values[1]) / (2 * step), float(sum((g * d).sum() for g, d in zip(exact, along)))
        assert abs(found - slope) < 1e-4 * abs(slope) + 1e-6, (kind, found, slope)


@pytest.mark.parametrize("kind", ["resnet", "resnet-plain", "xception", "vitc"])
def test_the_detached_gradient_is_another_one(kind):
    detector, images, masks = made(kind)
    exact, detached = (torch.cat([g.flatten() for g in gradient(detector, outside_share(detector, images, masks, through=through).sum())]) for through in ("exact", "detached"))
    assert torch.cosine_similarity(exact, detached, 0) < 0.9
    assert float((exact - detached).norm()) > 0.3 * float(exact.norm())


def test_at_exponent_one_nothing_is_dynamic_but_the_winners():
    detector, images, masks = made("resnet-b1")
    exact, detached = (torch.cat([g.flatten() for g in gradient(detector, outside_share(detector, images, masks, through=through).sum())]) for through in ("exact", "detached"))
    assert torch.allclose(exact, detached, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["ordinary", "ordinary-vitc"])
def test_an_ordinary_detector_by_double_backward(kind):
    detector, images, masks = made(kind)
    parameters = list(detector.parameters())
    with evaluating(detector), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        encoded = detector.encode(images).requires_grad_()
        weights = torch.autograd.grad(detector.logits_of(encoded)[:, 1].sum(), encoded, create_graph=True)[0]
    share = energy_outside((weights * encoded.detach()).sum(1), masks[:, 0])
    expected = torch.autograd.grad(share.sum(), parameters, allow_unused=True)
    found = outside_share(detector, images, masks)
    assert torch.allclose(found, share)
    for one, other in zip(gradient(detector, found.sum()), expected):
        assert torch.allclose(one, torch.zeros_like(one) if other is None else other, rtol=1e-7, atol=1e-10)


def test_frozen_layers_leave_the_others_their_gradient():
    detector, images, masks = made("resnet")
    whole = dict(zip([name for name, _ in detector.named_parameters()], gradient(detector, outside_share(detector, images, masks).sum())))
    for name, parameter in detector.named_parameters():
        parameter.requires_grad_(name.startswith("conv1"))
    outside_share(detector, images, masks).sum().backward()
    assert torch.allclose(detector.conv1.weight.grad, whole["conv1.weight"], rtol=1e-9, atol=1e-14)
    assert detector.layer4[0].conv1.weight.grad is None and not detector.layer4[0].conv1.weight.requires_grad


# what it leaves as it was ---------------------------------------------------------------------------------------------
def test_modes_statistics_and_layers_are_left_as_they_were():
    detector, images, masks = made("resnet")
    detector.layer3.eval()
    modes, buffers = [m.training for m in detector.modules()], {n: b.clone() for n, b in detector.named_buffers()}
    guidance_loss(detector, images, torch.ones(3, dtype=torch.long), masks).backward()
    assert modes == [m.training for m in detector.modules()] and all(p.requires_grad for p in detector.parameters())
    assert all(torch.equal(buffers[n], b) for n, b in detector.named_buffers())
    assert not any(getattr(m, "is_explaining", False) or getattr(m, "keeps_graph", False) for m in detector.modules())
    with pytest.raises(RuntimeError, match="planted"), explanation_mode(detector, keep_graph=True):
        raise RuntimeError("planted")
    assert not any(getattr(m, "is_explaining", False) or getattr(m, "keeps_graph", False) for m in detector.modules())


def test_without_gradient_there_is_no_graph_and_the_same_value():
    detector, images, masks = made("resnet")
    with torch.no_grad():
        quick = outside_share(detector, images, masks)
    assert not quick.requires_grad and torch.equal(quick, outside_share(detector, images, masks).detach())


def test_a_step_beside_the_classification_sums_both_gradients():
    detector, images, masks = made("resnet")
    labels = torch.ones(3, dtype=torch.long)
    detector.eval()
    classification = gradient(detector, nn.functional.cross_entropy(detector(images), labels))
    guidance = gradient(detector, guidance_loss(detector, images, labels, masks))
    logits = detector(images)
    (nn.functional.cross_entropy(logits, labels) + 0.3 * guidance_loss(detector, images, labels, masks)).backward()
    for p, c, g in zip(detector.parameters(), classification, guidance):
        assert torch.allclose(p.grad, c + 0.3 * g, rtol=1e-9, atol=1e-13)


# which frames count ---------------------------------------------------------------------------------------------------
def test_real_frames_and_empty_masks_are_left_out_of_the_mean():
    detector, images, masks = made("resnet")
    images, masks = torch.cat([images, images.flip(3)]), torch.cat([masks, masks])
    labels = torch.tensor([1, 0, 1, 1, 1, 0])
    masks[3] = 0
    shares = outside_share(detector, images, masks)
    assert shares[3] == 0 and bool((shares[[0, 1, 2, 4, 5]] > 0).all())
    assert torch.allclose(guidance_loss(detector, images, labels, masks), shares[[0, 2, 4]].mean())
    assert torch.allclose(guidance_loss(detector, images, labels, masks[:, 0] > 0), shares[[0, 2, 4]].mean())
    assert torch.allclose(guidance_loss(detector, images, labels, (255 * masks).to(torch.uint8)), shares[[0, 2, 4]].mean())
    assert torch.allclose(guidance_loss(detector, images, labels, masks, share=0.5), shares[[0, 2]].mean())
    mixed = torch.tensor([[0.3, 0.7], [1, 0], [0.9, 0.1], [0, 1], [1.0, 0], [1, 0]])
    assert torch.allclose(guidance_loss(detector, images, mixed, masks), shares[[0, 2]].mean())
    for none in (guidance_loss(detector, images, 0 * labels, masks), guidance_loss(detector, images, labels, 0 * masks)):
        assert none == 0 and not none.requires_grad


def test_what_does_not_fit_is_refused():
    detector, images, masks = made("resnet")
    labels = torch.ones(3, dtype=torch.long)
    with pytest.raises(ValueError, match="with_mask=True"):
        guidance_loss(detector, images, labels, None)
    with pytest.raises(ValueError, match="one mask an image"):
        guidance_loss(detector, images, labels, masks[..., :16])
    with pytest.raises(ValueError, match="share=0"):
        guidance_loss(detector, images, labels, masks, share=0)
    with pytest.raises(ValueError, match="exact, detached"):
        outside_share(detector, images, masks, through="half")
    with pytest.raises(ValueError, match="class 1 is fake"):
        outside_share(detector, images, masks, 2)


def test_a_class_for_every_image():
    detector, images, masks = made("resnet")
    masks[1] = 0
    both = torch.stack([outside_share(detector, images, masks, target) for target in (0, 1)])
    assert torch.allclose(outside_share(detector, images, masks, torch.tensor([1, 0, 0])), torch.stack([both[1, 0], both[0, 1], both[0, 2]]))


# layouts, precision, processes ----------------------------------------------------------------------------------------
def test_channels_last_is_the_same():
    detector, images, masks = made("xception")
    expected = gradient(detector, guidance_loss(detector, images, torch.ones(3, dtype=torch.long), masks))
    detector = detector.to(memory_format=torch.channels_last)
    found = gradient(detector, guidance_loss(detector, images.contiguous(memory_format=torch.channels_last), torch.ones(3, dtype=torch.long), masks))
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(expected, found))


@pytest.mark.parametrize("kind", ["resnet", "vitc"])
def test_reduced_precision_is_close(kind):
    detector, images, masks = made(kind, torch.float32)
    labels = torch.ones(3, dtype=torch.long)
    expected = guidance_loss(detector, images, labels, masks)
    with torch.autocast("cpu", torch.bfloat16):
        found = guidance_loss(detector, images, labels, masks)
    assert found.dtype == torch.float32 and abs(float(found.detach() - expected.detach())) < 0.02
    one, other = (torch.cat([g.flatten() for g in gradient(detector, loss)]) for loss in (expected, found))
    assert bool(other.isfinite().all()) and torch.cosine_similarity(one, other, 0) > 0.9


def one_process(rank, processes, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    try:
        detector, images, masks = made("resnet")
        images, masks = torch.cat([images, images.flip(3)]), torch.cat([masks, masks])
        detector.eval()
        wrapped = DistributedDataParallel(detector)
        own = slice(rank, None, processes)
        labels = torch.ones(len(images[own]), dtype=torch.long)
        loss = nn.functional.cross_entropy(wrapped(images[own]), labels) + guidance_loss(wrapped, images[own], labels, masks[own])
        loss.backward()
        torch.save([p.grad for p in detector.parameters()], f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def gradients_of(processes, tmp_path):
    folder = tmp_path / str(processes)
    folder.mkdir()
    if processes == 1:
        one_process(0, 1, str(folder))
    else:
        spawn(one_process, (processes, str(folder)), processes)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def expected_gradients():
    detector, images, masks = made("resnet")
    images, masks = torch.cat([images, images.flip(3)]), torch.cat([masks, masks])
    detector.eval()
    labels = torch.ones(6, dtype=torch.long)
    return gradient(detector, nn.functional.cross_entropy(detector(images), labels) + guidance_loss(detector, images, labels, masks))


def test_a_wrapped_detector_gets_the_same_gradient(tmp_path):
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-13) for a, b in zip(gradients_of(1, tmp_path)[0], expected_gradients()))


@pytest.mark.slow
def test_two_processes_get_the_gradient_of_the_whole_batch(tmp_path):
    expected = expected_gradients()
    for found in gradients_of(2, tmp_path):
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-13) for a, b in zip(found, expected))


# localization ---------------------------------------------------------------------------------------------------------
def some_frames(count=10, side=32):
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(count) % 3 > 0).long()
    masks = torch.zeros(count, 1, side, side, dtype=torch.uint8)
    masks[labels == 1, :, 6:20, 4:16] = 255
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return Frames(images, masks, labels, [f"{k:03d}" for k in range(count)], pd.DataFrame({"label": labels.numpy()}))


@pytest.mark.parametrize("kind", ["resnet", "ordinary"])
def test_localization_is_the_mean_over_the_fakes(kind):
    detector, *_ = made(kind, torch.float32)
    frames = some_frames()
    images, marked = frames.batch(frames.labels == 1)["image"], frames.masks[frames.labels == 1][:, 0] == 255
    maps = contributions_of(detector, images).clamp(min=0)
    scores = localization_scores(maps / maps.amax((1, 2), keepdim=True), marked, [0.0])["weighted"][0]
    assert abs(inside_share(detector, frames) - float(scores.mean())) < 1e-5
    assert abs(inside_share(detector, frames, batch_size=3) - inside_share(detector, frames)) < 1e-6
    assert abs(inside_share(detector, frames, limit=2) - float(scores[[0, -1]].mean())) < 1e-5
    assert inside_share(AveragedModel(detector), frames) == inside_share(detector, frames)
    frames.masks[frames.labels.nonzero()[0]] = 0
    assert abs(inside_share(detector, frames) - float(scores[1:].mean())) < 1e-5
    assert detector.training and next(detector.parameters()).requires_grad


def test_localization_reads_files_as_it_reads_memory(tmp_path):
    import cv2

    frames = some_frames(5)
    rows = []
    for k in range(5):
        cv2.imwrite(str(tmp_path / f"{k}.png"), frames.images[k].permute(1, 2, 0).numpy()[..., ::-1].copy())
        cv2.imwrite(str(tmp_path / f"{k}m.png"), frames.masks[k, 0].numpy())
        rows.append(dict(frame=f"{k}.png", mask=f"{k}m.png" if frames.labels[k] else None, video=f"{k}", label=int(frames.labels[k])))
    detector, *_ = made("resnet", torch.float32)
    dataset = FrameDataset(pd.DataFrame(rows), 32, root=tmp_path, with_mask=True)
    assert abs(inside_share(detector, dataset) - inside_share(detector, frames)) < 1e-6
    (tmp_path / "1.png").write_bytes(b"broken")
    with pytest.raises(ValueError):
        inside_share(detector, dataset)


def test_localization_needs_masks_and_fakes():
    detector, *_ = made("resnet", torch.float32)
    frames = some_frames()
    with pytest.raises(ValueError, match="no fakes"):
        inside_share(detector, frames[frames.labels == 0])
    with pytest.raises(ValueError, match="no masks"):
        inside_share(detector, Frames(frames.images, None, frames.labels, frames.videos, frames.catalog))
    frames.masks.zero_()
    with pytest.raises(ValueError, match="are empty"):
        inside_share(detector, frames)
