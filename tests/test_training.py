"""Training: what it learns, that a kill does not show, and what it refuses. Losses, schedule and crops against their equations."""
import io
import json
import math
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from bcos_nb.data import FrameDataset, Frames, forge_dataset, load_frames, read_catalog
from bcos_nb.data.augment import crop_and_flip
from bcos_nb.models import create_detector, load_detector
from bcos_nb.training import FitConfig, class_weights, cross_entropy, fit, make_config, make_optimizer, predict_logits, warmup_cosine
from bcos_nb.training.loop import augmented, epoch_order

NUMBERS = ["epoch", "train_loss", "grad_norm", "val_loss", "val_auc", "lr"]  # of the history, without the seconds


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Sums in one order, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def toy(count, seed, side=24, classes=(0, 1)):
    """Noise images; the fakes carry a weak checkerboard somewhere."""
    random = np.random.default_rng(seed)
    labels = random.choice(classes, count, p=None if len(classes) == 1 else (0.3, 0.7))
    images = random.normal(128, 20, (count, 3, side, side))
    rows, columns = np.mgrid[:side, :side]
    for image, label in zip(images, labels):
        top, left = random.integers(0, side - 15, 2)
        if label:
            image[:, top : top + 16, left : left + 16] += 45 * ((rows + columns) % 2 * 2 - 1)[:16, :16]
    names = [f"v{k}/0.png" for k in range(count)]
    catalog = pd.DataFrame(dict(frame=names, mask=None, video=[f"v{k}" for k in range(count)], label=labels, method="toy", source_frame=None))
    return Frames(torch.tensor(images.clip(0, 255).astype(np.uint8)), None, torch.tensor(labels), list(catalog["video"]), catalog)


def tiny(b=2, seed=0):
    torch.manual_seed(seed)
    return create_detector("resnet10", b=b, width=0.125, stem="fine")


def quick(**changes):
    return FitConfig(**(dict(epochs=2, batch_size=16, lr=3e-3) | changes))


def same(one, other):
    pd.testing.assert_frame_equal(one[NUMBERS], other[NUMBERS], check_exact=True)


# ---- learning

def auc_of(detector, frames):
    """The share of pairs of a fake and a real frame that are in order."""
    margin = predict_logits(detector, frames).double().diff(dim=1)[:, 0]  # as exact as what `fit` ranks
    fake, real = margin[frames.labels == 1, None], margin[frames.labels == 0]
    return float((fake > real).double().mean() + 0.5 * (fake == real).double().mean())


@pytest.mark.parametrize("b", [None, 1.25, 2])
def test_learns_a_separable_problem(b, tmp_path):
    train, val = toy(240, 0), toy(80, 1)
    detector = tiny(b)
    history = fit(detector, train, val, quick(epochs=6, crop=20), tmp_path, progress=False)
    assert auc_of(detector, val) > 0.95 and auc_of(detector, val) == pytest.approx(history["val_auc"].max(), abs=1e-3)
    assert list(history["epoch"]) == [1, 2, 3, 4, 5, 6] and list(history.columns) == [*NUMBERS, "seconds"] and history["seconds"].gt(0).all()
    assert not detector.training
    assert torch.equal(predict_logits(detector, val), predict_logits(load_detector(tmp_path), val))
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "history.parquet"), history)


def test_the_best_epoch_is_kept_not_the_last(tmp_path):
    train, val, detector = toy(160, 0), toy(80, 1), tiny(None)

    def spoil_the_last_epoch(text, share):
        if share == 1:
            with torch.no_grad():
                detector.fc.weight.neg_(), detector.fc.bias.neg_()

    history = fit(detector, train, val, quick(), tmp_path, progress=False, on_progress=spoil_the_last_epoch)
    assert history["val_auc"][0] > 0.9 and history["val_auc"][1] < 0.1
    assert auc_of(detector, val) == auc_of(load_detector(tmp_path), val) == pytest.approx(history["val_auc"][0], abs=1e-3)


def test_the_history_says_what_the_equations_say(tmp_path):
    train, val = toy(50, 0), toy(20, 1)
    detector = tiny(None)
    history = fit(detector, train, val, quick(epochs=1, batch_size=64, lr=1e-12, flip=False, clip_norm=0.1), tmp_path, progress=False)
    twin = tiny(None).train()  # one batch holds everything, and a learning rate this small changes nothing
    counts = np.bincount(train.labels.numpy())
    weights = torch.tensor(50 / (2 * counts)).float()
    logits = twin(train.images.float() / 255)
    losses = -logits.log_softmax(1).gather(1, train.labels[:, None])[:, 0] * weights[train.labels]
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(losses.mean(), list(twin.parameters()))]).norm()
    assert history["train_loss"][0] == pytest.approx(float(losses.detach().mean()), rel=1e-4)
    assert history["grad_norm"][0] == pytest.approx(float(norm), rel=1e-3)  # before clipping
    logits = predict_logits(detector, val).double()
    weights = torch.tensor(20 / (2 * np.bincount(val.labels.numpy())))
    val_loss = float((-logits.log_softmax(1).gather(1, val.labels[:, None])[:, 0] * weights[val.labels]).mean())
    assert history["val_loss"][0] == pytest.approx(val_loss, rel=1e-4)


def batches_seen(detector, frames, train):
    """Which frames a detector is trained on, batch by batch, whole and not mirrored."""
    seen = []

    def look(module, inputs):
        if module.training:
            same_picture = (inputs[0][:, None] - frames.images.float() / 255).abs().flatten(2).amax(2) < 1e-4
            seen.append(same_picture.nonzero()[:, 1])

    handle = detector.register_forward_pre_hook(look)
    train()
    handle.remove()
    return seen


def test_steps_are_clipped_adam_with_the_schedules_rate(tmp_path):
    train = toy(40, 0)
    config = quick(epochs=1, batch_size=20, flip=False, clip_norm=0.05, weight_decay=0.01, balance="none", lr=0.01, warmup=0.0)
    detector, twin = tiny(2), tiny(2).train()
    seen = batches_seen(detector, train, lambda: fit(detector, train, toy(20, 1), config, tmp_path, progress=False))
    assert len(seen) == 2
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.01, weight_decay=0.01)
    for step, indices in enumerate(seen):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * step / 2)) / 2
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(train.images[indices].float() / 255), train.labels[indices]).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        optimizer.step()
    for ours, theirs in zip(detector.parameters(), twin.parameters()):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_same_seed_same_numbers_and_another_seed_others(tmp_path):
    train, val = toy(64, 0), toy(30, 1)
    histories, weights = [], []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(len(name) + seed)
        np.random.seed(seed)
        histories.append(fit(tiny(), train, val, quick(crop=20, seed=seed), tmp_path / name, progress=False))
        weights.append((tmp_path / name / "detector.safetensors").read_bytes())
    same(histories[0], histories[1])
    assert weights[0] == weights[1] != weights[2] and not np.allclose(histories[0]["train_loss"], histories[2]["train_loss"], rtol=1e-6)


def test_reduced_precision_trains_in_the_same_process(tmp_path):
    train, val = toy(64, 0), toy(30, 1)
    full = fit(tiny(), train, val, quick(epochs=1, lr=1e-5), tmp_path / "full", progress=False)
    reduced = fit(tiny(), train, val, quick(epochs=1, lr=1e-5, mixed_precision="bf16"), tmp_path / "reduced", progress=False)
    assert reduced["train_loss"][0] == pytest.approx(full["train_loss"][0], rel=0.1) and reduced["train_loss"][0] != full["train_loss"][0]
    assert all(value.dtype != torch.bfloat16 for value in load_file(tmp_path / "reduced" / "detector.safetensors").values())


def test_progress_is_reported_to_the_end(tmp_path):
    told = []
    shown = io.StringIO()
    with redirect_stderr(shown):
        fit(tiny(), toy(64, 0), toy(30, 1), quick(), tmp_path, progress=True, on_progress=lambda text, share: told.append((text, share)))
    assert told[-1] == ("epoch 2/2, batch 4/4", 1.0) and [share for _, share in told] == sorted(share for _, share in told)
    assert "training" in shown.getvalue()


# ---- from disk and from memory

def test_frames_from_disk_and_from_memory_train_alike(tmp_path):
    root = forge_dataset(tmp_path / "forged", identities=6, frames_per_video=2, size=48, compressions=("c23",), progress=False, workers=1)
    train, val = (read_catalog(root, "FaceForensics++", split, "c23") for split in ("train", "val"))
    config = quick(crop=40, batch_size=8)
    from_disk = fit(tiny(), FrameDataset(train, 48), FrameDataset(val, 48), config, tmp_path / "disk", progress=False)
    in_memory = fit(tiny(), load_frames(train, 48, with_mask=False), load_frames(val, 48), config, tmp_path / "memory", progress=False)
    same(from_disk, in_memory)
    assert (tmp_path / "disk" / "detector.safetensors").read_bytes() == (tmp_path / "memory" / "detector.safetensors").read_bytes()


# ---- a kill does not show

CHILD = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_training import interrupted_training
interrupted_training(sys.argv[2], on_progress=lambda text, share: print(text, flush=True))
"""


def interrupted_training(run_dir, **options):
    """The training that is killed, and the one that is not."""
    config = quick(epochs=4, crop=20, batch_size=8)
    return fit(tiny(1.75, seed=7), toy(160, 0), toy(40, 1), config, run_dir, progress=False, **options)


def start_child(run_dir):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, os.path.dirname(__file__), str(run_dir)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def test_a_killed_training_goes_on_bit_for_bit(tmp_path):
    undisturbed = interrupted_training(tmp_path / "whole")
    cut, lines = tmp_path / "cut", []
    child = start_child(cut)
    for line in child.stdout:
        lines.append(line)
        if line.startswith("epoch 2/4"):
            child.send_signal(signal.SIGKILL)
            break
    child.stdout.close()
    assert child.wait(60) == -signal.SIGKILL, "".join(lines)
    assert {path.name for path in cut.iterdir()} == {"state"}  # nothing looks complete
    assert torch.load(cut / "state" / "last.pt", weights_only=True)["epoch"] == 1
    (cut / "state" / ".last.pt.1.tmp").write_bytes(b"half a state")  # as a kill while writing leaves it
    told = []

    def stop_in_the_third_epoch(text, share):
        told.append(text)
        if text.startswith("epoch 3/4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_training(cut, on_progress=stop_in_the_third_epoch)
    assert told[0].startswith("epoch 2/4")  # went on, did not begin anew
    resumed = interrupted_training(cut)
    same(resumed, undisturbed)
    ours, theirs = ((tmp_path / name / "detector.safetensors").read_bytes() for name in ("cut", "whole"))
    assert ours == theirs
    assert json.loads((cut / "detector.json").read_text()) == json.loads((tmp_path / "whole" / "detector.json").read_text())


def test_a_finished_training_is_not_done_again(tmp_path):
    train, val = toy(40, 0), toy(20, 1)
    first = fit(tiny(), train, val, quick(), tmp_path, progress=False)
    weights = (tmp_path / "detector.safetensors").read_bytes()
    told, other = [], tiny(seed=5)
    again = fit(other, train, val, quick(), tmp_path, progress=False, on_progress=lambda *a: told.append(a))
    pd.testing.assert_frame_equal(again, first)
    assert told == [] and (tmp_path / "detector.safetensors").read_bytes() == weights
    assert torch.equal(predict_logits(other, val), predict_logits(load_detector(tmp_path), val))


# ---- refusals

@pytest.mark.parametrize("change", [dict(lr=1e-4), dict(epochs=3), dict(seed=1), dict(crop=20), dict(betas=(0.8, 0.999))])
def test_a_folder_with_other_settings_is_refused(change, tmp_path):
    train, val = toy(40, 0), toy(20, 1)
    fit(tiny(), train, val, quick(epochs=1), tmp_path, progress=False)
    weights = (tmp_path / "detector.safetensors").read_bytes()
    with pytest.raises(ValueError, match=f"other settings.*{next(iter(change))}"):
        fit(tiny(), train, val, quick(**(dict(epochs=1) | change)), tmp_path, progress=False)
    assert (tmp_path / "detector.safetensors").read_bytes() == weights


@pytest.mark.parametrize("other", [dict(b=1.25), dict(b=None), dict(b=2, width=0.25), dict(b=2, max_out=1)])
def test_a_folder_with_another_detector_is_refused(other, tmp_path):
    train, val = toy(40, 0), toy(20, 1)
    fit(tiny(), train, val, quick(epochs=1), tmp_path, progress=False)
    with pytest.raises(ValueError, match=tmp_path.name):
        fit(create_detector("resnet10", **(dict(width=0.125, stem="fine") | other)), train, val, quick(epochs=1), tmp_path, progress=False)


def test_a_damaged_state_is_named(tmp_path):
    train, val = toy(40, 0), toy(20, 1)
    fit(tiny(), train, val, quick(epochs=1), tmp_path, progress=False)
    state = tmp_path / "state" / "last.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises((ValueError, RuntimeError), match=r"last\.pt"):
        fit(tiny(), train, val, quick(epochs=1), tmp_path, progress=False)


HOLD = "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); sys.stdin.read()"


def test_a_folder_that_another_process_trains_in_is_refused(tmp_path):
    (tmp_path / "state").mkdir()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "state" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(RuntimeError, match=f"(?i)another process.*{tmp_path.name}"):
            fit(tiny(), toy(40, 0), toy(20, 1), quick(epochs=1), tmp_path, progress=False)
        assert {path.name for path in tmp_path.iterdir()} == {"state"}
        holder.stdin.close()
        holder.wait(30)
    assert len(fit(tiny(), toy(40, 0), toy(20, 1), quick(epochs=1), tmp_path, progress=False)) == 1


@pytest.mark.parametrize("classes,words", [((0,), r"\[40, 0\]"), ((1,), r"\[0, 40\]")])
def test_a_split_of_one_class_is_refused_before_training(classes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        fit(tiny(), toy(40, 0, classes=classes), toy(20, 1), quick(), tmp_path, progress=False)
    started = []
    with pytest.raises(ValueError, match=words):
        fit(tiny(), toy(20, 1), toy(40, 0, classes=classes), quick(), tmp_path, progress=False, on_progress=lambda *a: started.append(a))
    assert not started and not (tmp_path / "detector.safetensors").exists()


@pytest.mark.parametrize("b", [None, 2])
def test_a_loss_that_is_no_number_stops_training_and_is_not_kept(b, tmp_path):
    detector = tiny(b)
    with torch.no_grad():
        detector.layer1[0].conv1.weight[0] = math.nan
    with pytest.raises(RuntimeError, match="no longer a number.*lr"):
        fit(detector, toy(40, 0), toy(20, 1), quick(), tmp_path, progress=False)
    assert not (tmp_path / "state" / "last.pt").exists() and not (tmp_path / "detector.safetensors").exists()
    assert len(fit(tiny(b), toy(40, 0), toy(20, 1), quick(epochs=1), tmp_path, progress=False)) == 1  # the folder is free again


def test_a_crop_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="crop=25.*24"):
        fit(tiny(), toy(40, 0), toy(20, 1), quick(crop=25), tmp_path, progress=False)


@pytest.mark.parametrize("settings", [dict(epochs=0), dict(batch_size=0), dict(eval_batch_size=-1)])
def test_counts_below_one_are_refused(settings):
    with pytest.raises(ValueError, match="at least 1"):
        FitConfig(**settings)


def test_unknown_settings_are_listed_with_the_known_ones():
    with pytest.raises(ValueError, match="no setting learning_rate.*epochs, batch_size, loss.*lr, schedule"):
        make_config(learning_rate=1, lr=0.1)
    assert make_config(lr=0.1, betas=[0.8, 0.9]) == FitConfig(lr=0.1, betas=(0.8, 0.9))


# ---- the parts

@pytest.mark.parametrize("counts", [(1, 1), (3, 12), (100, 7)])
def test_class_weights_are_scikit_learns(counts):
    labels = torch.tensor([0] * counts[0] + [1] * counts[1])
    theirs = compute_class_weight("balanced", classes=np.array([0, 1]), y=labels.numpy())
    assert np.allclose(class_weights(labels), theirs) and class_weights(labels, "none").tolist() == [1, 1]
    assert float(class_weights(labels)[labels].mean()) == pytest.approx(1)


@pytest.mark.parametrize("labels,balance,words", [([0, 0], "weight", r"\[2, 0\]"), ([1], "none", r"\[0, 1\]"), ([0, 1], "sometimes", "sometimes.*weight, none")])
def test_class_weights_refuse(labels, balance, words):
    with pytest.raises(ValueError, match=words):
        class_weights(torch.tensor(labels), balance)


def test_cross_entropy_by_hand():
    logits, labels, weights = torch.tensor([[2.0, -1.0], [0.5, 0.0]]), torch.tensor([1, 0]), torch.tensor([0.5, 3.0])
    expected = (3.0 * math.log(1 + math.exp(3)) + 0.5 * math.log(1 + math.exp(-0.5))) / 2
    assert float(cross_entropy(logits, labels, weights)) == pytest.approx(expected, rel=1e-6)
    half = cross_entropy(logits.bfloat16(), labels, weights)
    assert half.dtype == torch.float32 and float(half) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("steps,warmup", [(100, 0.1), (10, 0.25), (7, 0.0), (1, 0.1), (5, 1.0)])
def test_the_schedule_rises_and_falls_along_a_cosine(steps, warmup):
    rates = [warmup_cosine(step, steps, warmup) for step in range(steps)]
    rising = max(1, round(steps * warmup)) if warmup else 0
    assert rates[:rising] == pytest.approx([(step + 1) / rising for step in range(rising)])
    assert all(0 < rate <= 1 for rate in rates) and max(rates) == 1
    if steps > rising:
        parameter = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - rising)
        for rate in rates[rising:]:
            assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
            optimizer.step(), theirs.step()
    assert warmup_cosine(steps, steps, warmup) == pytest.approx(0, abs=1e-12) or steps == rising


@pytest.mark.parametrize("lr", [0, -1, float("nan")])
def test_learning_rates_that_are_not_positive_are_refused(lr):
    with pytest.raises(ValueError, match="above 0"):
        make_optimizer(tiny().parameters(), lr)


@pytest.mark.parametrize("count,size", [(50, 8), (5, 8), (32, 16)])
def test_an_epoch_is_a_permutation_in_full_batches(count, size, tmp_path):
    train, detector = toy(count, 3), tiny(None)
    config = quick(epochs=2, batch_size=size, flip=False, lr=1e-9)
    seen = batches_seen(detector, train, lambda: fit(detector, train, toy(20, 1), config, tmp_path, progress=False))
    epochs = torch.cat(seen).chunk(2)
    assert {len(batch) for batch in seen} == {min(size, count)}
    for epoch in epochs:
        assert len(epoch.unique()) == len(epoch) == count // min(size, count) * min(size, count)
    assert not torch.equal(*epochs)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_every_batch_between_them(processes):
    train, config = toy(30, 3), quick(batch_size=9)
    whole = epoch_order(train, 1, config)
    shares = [epoch_order(train, 1, config, rank, processes) for rank in range(processes)]
    for number, batch in enumerate(whole):
        assert torch.equal(torch.cat([share[number] for share in shares]).sort().values, batch.sort().values)


@pytest.mark.parametrize("height,width,size", [(12, 17, 8), (9, 9, 9), (5, 8, 1)])
def test_crops_are_squares_of_the_image_mirrored_every_other_time(height, width, size):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([rows, columns, 100 * rows + columns]).float().expand(200, -1, -1, -1)
    cropped = crop_and_flip(places, size, torch.Generator().manual_seed(0))
    assert cropped.shape == (200, 3, size, size) and cropped.is_contiguous()
    mirrored, corners = 0, set()
    for rows, columns, both in cropped.long():
        top, left, right = int(rows[0, 0]), int(columns.min()), int(columns.max())
        assert torch.equal(both, 100 * rows + columns) and right - left == size - 1  # channels stay together
        assert torch.equal(rows, (top + torch.arange(size))[:, None].expand(size, size))
        flipped = size > 1 and bool(columns[0, 0] > columns[0, 1])
        expected = torch.arange(left, right + 1)
        assert torch.equal(columns, (expected.flip(0) if flipped else expected).expand(size, size))
        mirrored += flipped
        corners.add((top, left))
    assert len(corners) > 0.6 * min(200, (height - size + 1) * (width - size + 1)) or size == min(height, width)
    assert 60 < mirrored < 140 or size == 1
    again = crop_and_flip(places, size, torch.Generator().manual_seed(0))
    assert torch.equal(again, cropped)
    still = crop_and_flip(places, size, torch.Generator().manual_seed(0), flip=False)
    assert size == 1 or bool((still[:, 1, 0, 0] < still[:, 1, 0, 1]).all())


@pytest.mark.parametrize("size", [0, 6, -1])
def test_crops_that_do_not_fit_are_refused(size):
    with pytest.raises(ValueError, match=f"crop={size}"):
        crop_and_flip(torch.zeros(1, 3, 5, 7), size)


def paired(count, seed):
    """The toy's fakes, each with the real frame it was made from in the same split."""
    real = toy(count, seed, classes=(0,))
    stripes = real.images.clone()
    stripes[:, :, 4:20, 4:20:4] = stripes[:, :, 4:20, 4:20:4] // 2 + 100
    catalog = pd.concat([real.catalog, real.catalog.assign(frame="fake/" + real.catalog["frame"], label=1, source_frame=real.catalog["frame"])])
    labels = torch.tensor(catalog["label"].to_numpy())
    return Frames(torch.cat([real.images, stripes]), None, labels, list(catalog["video"]), catalog.reset_index(drop=True))


def test_pairs_stand_side_by_side_and_are_cut_alike():
    frames = paired(24, 0)
    config = quick(balance="pairs", crop=16)
    order = epoch_order(frames, 0, config)
    table = frames.catalog
    assert len(order) == 3 and sorted(i for batch in order for i in batch[:8].tolist()) == list(range(24, 48))
    for batch in order:
        fakes, reals = table.iloc[batch[:8].tolist()], table.iloc[batch[8:].tolist()]
        assert (fakes["label"] == 1).all() and list(fakes["source_frame"]) == list(reals["frame"])
    images = frames.images[order[0][8:]].float().repeat(2, 1, 1, 1)  # a "fake" equal to its source stays equal after the same crop and flip
    fake, real = augmented(images, config, torch.Generator().manual_seed(0)).chunk(2)
    assert fake.shape[2:] == (16, 16) and torch.equal(fake, real) and not torch.equal(fake, images[:8, :, :16, :16])


def test_pairs_need_sources(tmp_path):
    with pytest.raises(ValueError, match="balance='weight'"):
        fit(tiny(), toy(40, 0), toy(20, 1), quick(balance="pairs"), tmp_path, progress=False)


def test_exponent_rises_and_only_its_final_value_counts(tmp_path):
    train, val = paired(32, 0), paired(16, 1)
    seen = []
    detector = tiny(b=2.5)
    detector.fc.register_forward_hook(lambda layer, *_: seen.append(layer.b) if layer.training else None)
    history = fit(detector, train, val, quick(epochs=4, balance="pairs", b_start=1.25, b_rise=0.5), tmp_path, progress=False)
    steps = len(seen) // 2
    assert seen[0] == 1.25 and seen == sorted(seen) and set(seen[steps:]) == {2.5} and len(set(seen[:steps])) > 2
    assert {layer.b for layer in detector.modules() if hasattr(layer, "unit_weight")} == {2.5}
    epochs_at_full_exponent = [b == 2.5 for b in seen[len(seen) // 4 - 1 :: len(seen) // 4]]
    assert epochs_at_full_exponent == [False, True, True, True]  # the rise ends in the last steps of the second
    assert auc_of(detector, val) == pytest.approx(history["val_auc"][epochs_at_full_exponent].max(), abs=1e-3)
