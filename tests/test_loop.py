"""The training loop's dependability and its options: kills, numbers that are none, full disks, averages, processes, trackers, selection."""
import copy
import json
import math
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from test_training import NUMBERS, one_thread, quick, same, tiny, toy  # noqa: F401, one_thread is a fixture
from sklearn.metrics import roc_auc_score
from torch import nn

from bcos_nb.data import Frames
from bcos_nb.models import create_detector, load_detector
from bcos_nb.training import FitConfig, fit, predict_logits
from bcos_nb.training import loop as loop_module
from bcos_nb.training.loop import epoch_order, selection_score

HERE = Path(__file__).parent


def masked(count, seed, side=24):
    """`toy` with the checkerboard's place as mask; the mask of a real frame is empty."""
    plain = toy(count, seed, side)
    blocks = (plain.images.float().mean(1)[:, 1:, 1:] - plain.images.float().mean(1)[:, :-1, 1:]).abs()
    masks = torch.zeros(count, 1, side, side, dtype=torch.uint8)
    for k in plain.labels.nonzero()[:, 0].tolist():
        rough = nn.functional.avg_pool2d(blocks[k][None, None], 15, stride=1)[0, 0]
        top, left = divmod(int(rough.argmax()), rough.shape[1])
        masks[k, :, top:top + 16, left:left + 16] = 255
    return Frames(plain.images, masks, plain.labels, plain.videos, plain.catalog)


# ---- kills

CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from test_loop import long_training
import torch
torch.set_num_threads(1)
print("begun", flush=True)
long_training(sys.argv[2])
print("ended", flush=True)
"""


def long_training(run_dir, **options):
    """Everything that has a state: average, drawn classes, random crops, saves within an epoch."""
    config = quick(epochs=3, crop=20, batch_size=8, balance="sample", ema=0.9, save_every=3, optimizer="sgd", lr=0.05)
    return fit(tiny(1.75, seed=7), toy(160, 0), toy(40, 1), config, run_dir, progress=False, **options)


def child_of(run_dir, limit=None):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", CHILD, str(HERE), str(run_dir)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, preexec_fn=limit)


def same_files(one, other):
    for name in ("detector.safetensors", "detector.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    same(pd.read_parquet(one / "history.parquet"), pd.read_parquet(other / "history.parquet"))


def test_a_training_cut_off_within_an_epoch_goes_on_from_that_batch_bit_for_bit(tmp_path):
    long_training(tmp_path / "whole")
    for stop in ("epoch 1/3, batch 8", "epoch 2/3, batch 16", "epoch 3/3, batch 20"):
        told = []

        def cut_off(text, share):
            told.append(text)
            if text.startswith(stop[:9]) and int(text.split("batch ")[1].split("/")[0]) >= int(stop.split("batch ")[1]):
                raise KeyboardInterrupt

        loop_module.time.monotonic, clock = iter(range(10, 10**7, 2)).__next__, loop_module.time.monotonic  # reports of every batch
        try:
            with pytest.raises(KeyboardInterrupt):
                long_training(tmp_path / "cut", on_progress=cut_off)
        finally:
            loop_module.time.monotonic = clock
        state = torch.load(tmp_path / "cut" / "state" / "last.pt", weights_only=True)
        epoch, batch = int(stop[6]) - 1, int(stop.split()[-1])
        assert (state["epoch"], state["batch"]) == ((epoch, (batch - 1) // 3 * 3))
    long_training(tmp_path / "cut")
    same_files(tmp_path / "cut", tmp_path / "whole")


def written(path):
    """When a file was written last; None if it is not there."""
    return path.stat().st_mtime_ns if path.is_file() else None


def wait_for_saves(child, path, count):
    """Returns when a training has saved so often, or has ended."""
    before = written(path)
    while count and child.poll() is None:
        now = written(path)
        count, before = count - (now != before), now
        time.sleep(0.001)


@pytest.mark.slow
def test_ten_kills_at_random_moments_do_not_show(tmp_path):
    with child_of(tmp_path / "whole") as whole:
        assert whole.wait(300) == 0, whole.stdout.read()
    moments, kills, states, last = random.Random(0), 0, set(), tmp_path / "cut" / "state" / "last.pt"
    for attempt in range(40):
        if kills == 10:
            break
        with child_of(tmp_path / "cut") as child:
            assert child.stdout.readline() == "begun\n"
            if attempt:  # the first dies before anything is saved
                wait_for_saves(child, last, moments.choice((1, 2)))
            time.sleep(moments.uniform(0, 0.04))
            ended = child.poll() is not None
            child.send_signal(signal.SIGKILL)
            child.wait(60)
            assert not ended or child.returncode == 0, child.stdout.read()
        kills += not ended
        if last.is_file():
            state = torch.load(last, weights_only=True)  # whole, whenever it is looked at
            states.add((state["epoch"], state["batch"]))
        if ended:  # it got to the end before ten kills: kill it again at its beginning
            for path in (tmp_path / "cut").rglob("*"):
                path.is_file() and path.unlink()
    assert kills == 10 and len(states) > 3
    with child_of(tmp_path / "cut") as child:
        assert child.wait(300) == 0, child.stdout.read()
    same_files(tmp_path / "cut", tmp_path / "whole")


def test_a_full_disk_loses_nothing_that_was_saved(tmp_path):
    sizes = []
    long_training(tmp_path / "whole", on_epoch=lambda row: sizes.append((tmp_path / "whole" / "state" / "last.pt").stat().st_size))
    size = sizes[0]
    assert sizes[1] > 0.99 * size and sizes[2] < 0.4 * size  # a training that is done keeps what it was done for

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * 9 // 10, size * 9 // 10))  # the first states fit, those with a best network do not

    with child_of(tmp_path / "cut", small_files) as child:
        told = child.stdout.read()
    assert child.returncode == 1 and "OSError" in told and "last.pt could not be written" in told and "MB are free" in told
    assert "holds the state after epoch 0 and 18 batches" in told
    state = torch.load(tmp_path / "cut" / "state" / "last.pt", weights_only=True)
    assert (state["epoch"], state["batch"]) == (0, 18)
    assert [path.name for path in (tmp_path / "cut" / "state").iterdir() if path.suffix == ".tmp"] == []
    long_training(tmp_path / "cut")
    same_files(tmp_path / "cut", tmp_path / "whole")


# ---- numbers that are none, and memory

def sometimes_nan(monkeypatch, bad):
    """Cross entropy that is NaN at the given calls, numbered from 1."""
    calls, true = [0], loop_module.make_loss("cross_entropy")

    def loss(logits, labels, weights):
        calls[0] += logits.requires_grad
        return true(logits, labels, weights) * (math.nan if calls[0] in bad and logits.requires_grad else 1)

    monkeypatch.setattr(loop_module, "make_loss", lambda name: loss)


def test_a_gradient_that_is_no_number_names_layer_step_and_checkpoint(tmp_path, monkeypatch):
    detector, train = tiny(2), toy(48, 0)

    def overflow(text, share):
        if text.startswith("epoch 2/3, batch 1/"):
            with torch.no_grad():
                detector.layer2[0].conv2.weight.fill_(math.inf)

    monkeypatch.setattr(loop_module.time, "monotonic", iter(range(10, 10**7, 2)).__next__)
    before = []
    with pytest.raises(RuntimeError) as error:
        fit(detector, train, toy(20, 1), quick(epochs=3), tmp_path, progress=False, on_progress=overflow, on_epoch=before.append)
    told = str(error.value)
    assert "epoch 2, batch 2 of 3, step 5" in told and "layer2.0.conv2.weight (BcosConv2d)" in told
    assert f"{tmp_path / 'state' / 'last.pt'} holds the state after epoch 1" in told and "lower lr" in told
    assert len(before) == 1 and torch.load(tmp_path / "state" / "last.pt", weights_only=True)["epoch"] == 1


def test_a_step_that_is_no_number_can_be_left_out(tmp_path, monkeypatch):
    sometimes_nan(monkeypatch, {2, 5})
    detector, weights = tiny(2), []
    monkeypatch.setattr(loop_module.time, "monotonic", iter(range(10, 10**7, 2)).__next__)
    keep = lambda *a: weights.append({name: value.clone() for name, value in detector.state_dict().items()})
    history = fit(detector, toy(48, 0), toy(20, 1), quick(non_finite="skip"), tmp_path, progress=False, on_progress=keep)
    assert list(history["skipped"]) == [1, 1] and history[NUMBERS].map(math.isfinite).all().all()
    unchanged = [all(torch.equal(before[name], after[name]) for name in before) for before, after in zip(weights, weights[1:])]
    assert unchanged == [True, False, False, True, False]  # weights and running statistics alike


def test_steps_are_not_left_out_for_ever(tmp_path, monkeypatch):
    sometimes_nan(monkeypatch, set(range(1, 1000)))
    with pytest.raises(RuntimeError, match="no longer a number.*step 21.*20 steps before it were left out"):
        fit(tiny(2), toy(200, 0), toy(20, 1), quick(non_finite="skip", batch_size=8, epochs=8), tmp_path, progress=False)


def with_scaler(monkeypatch):
    """What accelerate sets up for fp16 on a GPU, here: gradients of a loss that is multiplied by a scale."""
    scaler, make = torch.amp.GradScaler("cpu", init_scale=2.0**16), loop_module.make_accelerator

    def make_accelerator(config, run_dir):
        accelerator = make(config, run_dir)
        accelerator.scaler, accelerator.unscale_gradients = scaler, lambda optimizer: scaler.unscale_(optimizer.optimizer)
        return accelerator

    monkeypatch.setattr(loop_module, "make_accelerator", make_accelerator)
    return scaler


@pytest.mark.parametrize("largest", [1000, 0])
def test_a_scale_that_is_too_large_is_halved_and_not_for_ever(largest, tmp_path, monkeypatch):
    scaler, true = with_scaler(monkeypatch), loop_module.make_loss("cross_entropy")

    def loss(logits, labels, weights):
        if logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * (math.inf if scaler.get_scale() > largest else 1))
        return true(logits, labels, weights)

    monkeypatch.setattr(loop_module, "make_loss", lambda name: loss)
    arguments = toy(200, 0), toy(20, 1), quick(batch_size=8, epochs=1, ema=0.5), tmp_path
    if not largest:
        with pytest.raises(RuntimeError, match="gradient is no longer a number.*step 21"):
            fit(tiny(), *arguments, progress=False)
        return
    monkeypatch.setattr(loop_module.time, "monotonic", iter(range(10, 10**7, 2)).__next__)
    detector, weights = tiny(), []
    history = fit(detector, *arguments, progress=False, on_progress=lambda *a: weights.append(detector.fc.weight.detach().clone()))
    moved = [not torch.equal(before, after) for before, after in zip(weights, weights[1:])]
    assert scaler.get_scale() == 512 and moved == [False] * 6 + [True] * 18  # 65536 is halved seven times
    assert history[NUMBERS].map(math.isfinite).all().all() and "skipped" not in history


def test_a_loss_that_is_none_can_be_left_out_under_a_scale(tmp_path, monkeypatch):
    with_scaler(monkeypatch)
    sometimes_nan(monkeypatch, {2, 5})
    history = fit(tiny(2), toy(48, 0), toy(20, 1), quick(non_finite="skip"), tmp_path, progress=False)
    assert list(history["skipped"]) == [1, 1] and history[NUMBERS].map(math.isfinite).all().all()


def test_reduced_precision_is_of_the_training_and_not_of_the_detector(tmp_path):
    detector, seen = tiny(2), []
    fit(detector, toy(40, 0), toy(20, 1), quick(epochs=1, mixed_precision="bf16"), tmp_path, progress=False, on_epoch=lambda row: seen.append(torch.backends.cudnn.deterministic))
    assert torch.equal(predict_logits(detector, toy(20, 1)), predict_logits(load_detector(tmp_path), toy(20, 1)))
    assert seen == [True] and not torch.backends.cudnn.deterministic


class Greedy(nn.Module):
    """Asks for more memory than there is when a batch is larger than 8."""

    def __init__(self):
        super().__init__()
        self.b, self.fc = None, nn.Linear(3 * 24 * 24, 2)

    def forward(self, images):
        if len(images) > 8 and self.training:
            torch.empty(2**50)
        return self.fc(images.flatten(1))


@pytest.mark.parametrize("balance,advice", [("weight", "batch_size=9"), ("pairs", "batch_size=8")])
def test_out_of_memory_names_the_batch_size_to_try(balance, advice, tmp_path):
    train = toy(40, 0)
    train.catalog.loc[train.labels.numpy() == 1, "source_frame"] = train.catalog["frame"][int((train.labels == 0).nonzero()[0, 0])]
    with pytest.raises(RuntimeError, match=f"Out of memory with batch_size=18.*Try {advice}"):
        fit(Greedy(), train, toy(20, 1), quick(batch_size=18, balance=balance), tmp_path, progress=False)


# ---- options, against what their equations say

def steps_of(monkeypatch, detector, train, tmp_path, **changes):
    """Weights after every step."""
    monkeypatch.setattr(loop_module.time, "monotonic", iter(range(10, 10**7, 2)).__next__)
    weights = [{name: value.clone() for name, value in detector.state_dict().items()}]
    keep = lambda *a: weights.append({name: value.clone() for name, value in detector.state_dict().items()})
    settings = dict(epochs=1, flip=False, clip_norm=None, balance="none", schedule="none") | changes
    fit(detector, train, toy(20, 1), quick(**settings), tmp_path, progress=False, on_progress=keep)
    return weights


def test_the_average_is_the_recursion_of_its_equation(tmp_path, monkeypatch):
    detector = tiny(None)
    weights = steps_of(monkeypatch, detector, toy(64, 0), tmp_path, ema=0.75)
    average = {name: value.double() for name, value in weights[1].items()}  # it begins with the first step
    for after in weights[2:]:
        average = {name: 0.75 * average[name] + 0.25 * after[name].double() for name in average}
    kept = load_file(tmp_path / "detector.safetensors")
    for name, value in kept.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(kept["fc.weight"], weights[-1]["fc.weight"])


def test_sharpness_aware_steps_use_the_gradient_nearby(tmp_path, monkeypatch):
    train, detector = toy(16, 0), tiny(2)
    twin = copy.deepcopy(detector).train()
    weights = steps_of(monkeypatch, detector, train, tmp_path, sam_rho=0.05, optimizer="sgd", momentum=0.0, lr=0.1)
    images, labels = train.images.float() / 255, train.labels
    order, = epoch_order(train, 0, quick(batch_size=16, balance="none"))

    def gradient(network):
        return torch.autograd.grad(nn.functional.cross_entropy(network(images[order]), labels[order]), list(network.parameters()))

    first = gradient(twin)
    norm = torch.cat([g.flatten() for g in first]).norm()
    near = copy.deepcopy(twin)
    with torch.no_grad():
        for parameter, g in zip(near.parameters(), first):
            parameter.add_(0.05 * g / norm)
    for (name, parameter), g in zip(twin.named_parameters(), gradient(near)):
        assert (weights[1][name] - (parameter.detach() - 0.1 * g)).norm() < 1e-3 * (0.1 * g).norm()
    buffers = dict(twin.named_buffers())
    assert all(torch.allclose(weights[1][name], value, atol=1e-6) for name, value in buffers.items())  # moved once, by the first pass


def test_classes_are_drawn_equally_often():
    train = toy(600, 0)
    order = torch.cat(epoch_order(train, 0, quick(balance="sample", batch_size=30)))
    assert len(order) == 600 and abs(float((train.labels[order] == 1).double().mean()) - 0.5) < 0.08  # four standard deviations
    assert float((train.labels == 1).double().mean()) > 0.65
    assert not torch.equal(order, torch.cat(epoch_order(train, 1, quick(balance="sample", batch_size=30))))


def test_repeats_stand_in_one_batch():
    train = toy(60, 0)
    order = epoch_order(train, 0, quick(repeats=3, batch_size=12, balance="none"))
    assert len(order) == 5
    for batch in order:
        assert (batch.bincount(minlength=60)[batch.unique()] == 3).all()
    assert len(torch.cat(order).unique()) == 20


def test_epochs_are_selected_by_what_is_asked_for(tmp_path):
    row = dict(val_auc=0.9, val_inside_share=0.4)
    assert selection_score(row, "auc") == 0.9 and selection_score(row, "localization") == 0.4
    assert selection_score(row, "both") == pytest.approx(0.6)
    history = fit(tiny(2), masked(48, 0), masked(24, 1), quick(select="localization", epochs=4), tmp_path, progress=False)
    best = int(history["val_inside_share"].idxmax())
    state = torch.load(tmp_path / "state" / "last.pt", weights_only=True)
    assert state["best_score"] == history["val_inside_share"][best]
    frames = masked(24, 1)
    assert roc(predict_logits(load_detector(tmp_path), frames), frames) == pytest.approx(history["val_auc"][best], abs=1e-6)


def roc(logits, frames):
    return roc_auc_score(frames.labels, logits.double().softmax(1)[:, 1])


def test_masks_are_demanded_before_training(tmp_path):
    with pytest.raises(ValueError, match="guidance=0.5 needs.*training.*with_mask=True"):
        fit(tiny(2), toy(40, 0), toy(20, 1), quick(guidance=0.5), tmp_path, progress=False)
    with pytest.raises(ValueError, match="select='both' needs.*validation"):
        fit(tiny(2), toy(40, 0), toy(20, 1), quick(select="both"), tmp_path, progress=False)


def test_guidance_moves_contributions_into_the_masks(tmp_path):
    train, val = masked(160, 0), masked(60, 1)
    shares = {}
    for weight in (0.0, 3.0):
        config = quick(epochs=4, crop=20, guidance=weight, select="both")
        history = fit(tiny(1.5), train, val, config, tmp_path / str(weight), progress=False)
        assert ("outside_share" in history) == (weight > 0) and history["val_auc"].max() > 0.85
        shares[weight] = history["val_inside_share"].iloc[-1]
    assert shares[3.0] > shares[0.0] + 0.05


@pytest.mark.parametrize("wrong,words", [
    (dict(optimizer="rmsprop"), "adam, adamw, sgd"), (dict(schedule="cyclic"), "warmup_cosine"), (dict(balance="pair"), "pairs, weight, sample, none"),
    (dict(clip_value=0.5), "one of clip_norm, clip_value"), (dict(ema=1.0), "below 1"), (dict(guidance=-1), "0"), (dict(sam_rho=0.0), "sam_rho"),
    (dict(loss="hinge"), "cross_entropy"), (dict(select="best"), "localization"), (dict(sam_rho=0.1, mixed_precision="fp16"), "bf16"),
])
def test_settings_that_make_no_sense_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        FitConfig(**wrong)


# ---- processes and trackers

PROCESSES = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_loop import shared_training

def main():
    shared_training(sys.argv[2])
    torch.distributed.destroy_process_group()

if __name__ == "__main__":
    if sys.argv[3] == "notebook":
        from accelerate import notebook_launcher
        notebook_launcher(main, num_processes=2, use_port=sys.argv[4])
    else:
        main()
"""


def shared_training(run_dir):
    """One step of plain descent, which shows the mean gradient."""
    config = quick(epochs=1, batch_size=100, balance="none", flip=False, optimizer="sgd", momentum=0.0, lr=1e-5, schedule="none", clip_norm=None)
    return fit(seeded(), toy(100, 0), toy(41, 1), config, run_dir, progress=False)


def seeded():
    """A detector without statistics of the batch, which would be those of a process's share."""
    torch.manual_seed(0)
    return create_detector("resnet10", b=1.5, width=0.125, stem="fine", norm="DetachableGroupNorm2d")


def free_port():
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return str(some.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("door", ["notebook", "shell"])
def test_two_processes_train_as_one_does(door, tmp_path):
    script, port = tmp_path / "script.py", free_port()
    script.write_text(PROCESSES)
    alone = shared_training(tmp_path / "alone")
    launch = [sys.executable] if door == "notebook" else [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    for run in ("one", "two"):
        done = subprocess.run([*launch, str(script), str(HERE), str(tmp_path / run), door, port], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    same_files(tmp_path / "one", tmp_path / "two")  # the same seed gives the same numbers
    state = torch.load(tmp_path / "one" / "state" / "last.pt", weights_only=True)
    assert json.loads(state["settings"])["processes"] == 2
    start = seeded().state_dict()
    ours, theirs = (torch.load(tmp_path / name / "state" / "last.pt", weights_only=True)["best"] for name in ("one", "alone"))  # of one epoch
    moved, apart = (torch.cat([(ours[name] - other[name]).flatten() for name in start]).norm() for other in (start, theirs))
    assert apart < 1e-3 * moved  # what the order of sums leaves: the same batch, the same mean gradient
    history = pd.read_parquet(tmp_path / "one" / "history.parquet")
    np.testing.assert_allclose(history[["train_loss", "val_loss", "val_auc"]], alone[["train_loss", "val_loss", "val_auc"]], rtol=1e-3)


def test_trackers_see_what_the_history_holds(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = fit(tiny(), toy(40, 0), toy(20, 1), quick(trackers="tensorboard"), tmp_path, progress=False)
    events = accumulator.EventAccumulator(str(tmp_path / "trackers" / "bcos_nb"))
    events.Reload()
    assert [round(event.value, 5) for event in events.Scalars("val_auc")] == [round(value, 5) for value in history["val_auc"]]
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2]


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(loop_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install wandb"):
        fit(tiny(), toy(40, 0), toy(20, 1), quick(trackers=("wandb",)), tmp_path, progress=False)


def test_no_tracker_is_started_unasked(tmp_path):
    fit(tiny(), toy(40, 0), toy(20, 1), quick(epochs=1), tmp_path, progress=False)
    assert not (tmp_path / "trackers").exists() and Accelerator().trackers == []


# ---- labels without meaning

def paired(count, seed, fakes=2):
    """Real frames of noise, and `fakes` fakes of each with a brighter corner."""
    random = np.random.default_rng(seed)
    real = random.normal(110, 25, (count, 3, 24, 24))
    forged = np.concatenate([real + 8 * (k + 1) * (np.arange(24) < 8)[:, None] for k in range(fakes)])
    names = [f"real{k}.png" for k in range(count)] + [f"fake{j}-{k}.png" for j in range(fakes) for k in range(count)]
    labels = np.array([0] * count + [1] * count * fakes)
    catalog = pd.DataFrame(dict(frame=names, mask=None, video=names, label=labels, method="toy", source_frame=[None] * count + names[:count] * fakes))
    return Frames(torch.tensor(np.concatenate([real, forged]).clip(0, 255).astype(np.uint8)), None, torch.tensor(labels), names, catalog)


def seen_in_training(train, val, config, run_dir, monkeypatch):
    """Row and label of every frame that a training has learnt from, batch by batch, and its history."""
    batches, step = [], loop_module.train_step
    rows = {image.numpy().tobytes(): row for row, image in enumerate(train.images)}

    def noted(run, images, labels, masks, number):
        batches.append([(rows[(255 * image).round().byte().numpy().tobytes()], int(label)) for image, label in zip(images, labels)])
        return step(run, images, labels, masks, number)

    monkeypatch.setattr(loop_module, "train_step", noted)
    history = fit(tiny(None), train, val, config, run_dir, progress=False)
    monkeypatch.undo()
    return batches, history


@pytest.mark.parametrize("balance", ["weight", "pairs", "sample"])
def test_shuffled_labels_stay_with_their_frames_and_out_of_validation(balance, tmp_path, monkeypatch):
    train, val = paired(20, 0), paired(12, 1)
    config = quick(epochs=3, balance=balance, flip=False, shuffle_labels=True)
    batches, history = seen_in_training(train, val, config, tmp_path, monkeypatch)
    given = {}
    for row, label in (frame for batch in batches for frame in batch):
        assert given.setdefault(row, label) == label  # the same in every epoch
    agree = np.mean([train.labels[row] == label for row, label in given.items()])
    assert 0.2 < agree < 0.8 and set(given.values()) == {0, 1}
    if balance == "pairs":
        for batch in batches:
            fakes, sources = batch[: len(batch) // 2], batch[len(batch) // 2 :]
            assert all(train.catalog["source_frame"][fake] == train.catalog["frame"][source] and mine + theirs == 1 for (fake, mine), (source, theirs) in zip(fakes, sources))
        assert {label for batch in batches for _, label in batch[: len(batch) // 2]} == {0, 1}
    elif balance == "sample":
        assert abs(np.mean([label for batch in batches for _, label in batch]) - 0.5) < 0.15  # of the labels that are learnt
    else:
        assert abs(sum(given.values()) - 40) <= 60 - len(given)  # a permutation, but for the frames of unfilled batches
    plain, _ = seen_in_training(train, val, quick(epochs=1, balance=balance, flip=False), tmp_path / "plain", monkeypatch)
    assert all(train.labels[row] == label for batch in plain for row, label in batch)
    assert train.labels.tolist() == train.catalog["label"].tolist() == [0] * 20 + [1] * 40  # nothing of it reaches the caller's frames
    kept = load_detector(tmp_path / "detector.safetensors")
    assert history["val_auc"].max() == pytest.approx(roc_auc_score(val.labels, predict_logits(kept, val).double().softmax(1)[:, 1]), abs=1e-6)


def test_a_seed_shuffles_and_a_training_with_shuffled_labels_resumes_bit_for_bit(tmp_path):
    train, val = paired(20, 0), paired(12, 1)
    whole = fit(tiny(), train, val, quick(epochs=3, balance="pairs", shuffle_labels=True, b_start=1.25), tmp_path / "whole", progress=False)

    def stop(row):
        if row["epoch"] == 1:
            raise KeyboardInterrupt

    config = quick(epochs=3, balance="pairs", shuffle_labels=True, b_start=1.25)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny(), train, val, config, tmp_path / "cut", progress=False, on_epoch=stop)
    same(fit(tiny(), train, val, config, tmp_path / "cut", progress=False), whole)
    one, other = load_file(tmp_path / "whole" / "detector.safetensors"), load_file(tmp_path / "cut" / "detector.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    shuffled = [loop_module.with_shuffled_labels(train, quick(shuffle_labels=True, seed=seed)).labels for seed in (0, 0, 1)]
    assert torch.equal(shuffled[0], shuffled[1]) and not torch.equal(shuffled[0], shuffled[2])


def test_a_folder_of_true_labels_is_not_gone_on_with_under_shuffled_ones(tmp_path):
    train, val = toy(40, 0), toy(40, 1)
    fit(tiny(), train, val, quick(epochs=1), tmp_path, progress=False)
    with pytest.raises(ValueError, match="shuffle_labels False → True"):
        fit(tiny(), train, val, quick(epochs=1, shuffle_labels=True), tmp_path, progress=False)
    with pytest.raises(ValueError, match="guidance=0"):
        FitConfig(shuffle_labels=True, guidance=0.5)
