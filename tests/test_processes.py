"""One training in several processes: from a notebook as from the shell, what is wrong with it, and what is left when a child dies."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file
from test_loop import free_port
from test_training import NUMBERS, one_thread, quick, tiny, toy  # noqa: F401, one_thread is a fixture

from bcos_nb.batch import install_kernels, run_jobs, run_name
from bcos_nb.batch.presets import preset_jobs
from bcos_nb.data import forge_dataset
from bcos_nb.training import fit_in_processes
from bcos_nb.training import processes as processes_module

HERE = Path(__file__).parent


@pytest.mark.parametrize("wrong", [0, -2, 1.5, True, "2"])
def test_a_number_of_processes_is_expected(wrong, tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        fit_in_processes(wrong, tiny(), toy(40, 0), toy(20, 1), quick(), tmp_path)
    assert not any(tmp_path.iterdir())


def test_what_a_fork_cannot_do_is_said_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ValueError, match="processes=4, and this kernel sees 1 GPU .CUDA_VISIBLE_DEVICES=3.*Python 3"):
        fit_in_processes(4, tiny(), toy(40, 0), toy(20, 1), quick(), tmp_path)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="Restart the kernel"):
        fit_in_processes(4, tiny(), toy(40, 0), toy(20, 1), quick(), tmp_path)


def test_one_process_is_this_one(tmp_path, monkeypatch):
    def forbidden(*arguments, **options):
        raise AssertionError("a process was started")

    monkeypatch.setattr(processes_module, "notebook_launcher", forbidden)
    histories = [fit_in_processes(count, tiny(), toy(40, 0), toy(20, 1), quick(epochs=1), tmp_path / str(count), progress=False) for count in (None, 1)]
    pd.testing.assert_frame_equal(histories[0][NUMBERS], histories[1][NUMBERS])


def test_an_error_in_a_child_is_told_as_if_it_had_been_here(tmp_path):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(ValueError, match="batch_size=1 leaves nothing of a batch for some of 2 processes.*at least 2"):
        fit_in_processes(2, tiny(), toy(40, 0), toy(20, 1), quick(batch_size=1), tmp_path, progress=False)
    assert {number: signal.getsignal(number) for number in before} == before  # the launcher would leave its own
    assert torch.distributed.is_available() and not torch.distributed.is_initialized() and "WORLD_SIZE" not in os.environ


def test_processes_draw_differently(tmp_path):
    detector = tiny()

    def draw(network, given):
        if network.training:
            (tmp_path / f"drawn{os.environ['RANK']}").open("a").write(f"{float(torch.rand(()))}\n")

    detector.register_forward_pre_hook(draw)
    fit_in_processes(2, detector, toy(64, 0), toy(20, 1), quick(epochs=1), tmp_path, progress=False)
    one, other = ((tmp_path / f"drawn{rank}").read_text().split() for rank in (0, 1))
    assert len(one) == len(other) == 4 and not set(one) & set(other)
    generator = torch.Generator().manual_seed(0)
    assert [float(number) for number in one] == torch.rand(4, generator=generator).tolist()  # the main process as if it were alone


def children_of(process):
    return [child for child in psutil.Process(process).children() if child.status() != psutil.STATUS_ZOMBIE]


def after_the_first_epoch(run_dir, do):
    """Calls `do` with the children once there is a state, in a thread."""
    def watch():
        end = time.monotonic() + 120
        while not (Path(run_dir) / "state" / "last.pt").is_file() and time.monotonic() < end:
            time.sleep(0.01)
        do(children_of(os.getpid()))

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_child_that_is_killed_ends_the_training_and_it_goes_on_from_there(tmp_path):
    config = quick(epochs=25, save_every=2)
    found = []

    def kill(children):
        found.extend(children)
        children[-1].kill()

    watch = after_the_first_epoch(tmp_path / "cut", kill)
    with pytest.raises(RuntimeError, match="killed.*goes on from its last state"):
        fit_in_processes(2, tiny(), toy(64, 0), toy(20, 1), config, tmp_path / "cut", progress=False)
    watch.join()
    psutil.wait_procs(found, timeout=10)
    assert len(found) == 2 and not children_of(os.getpid())
    resumed, whole = (fit_in_processes(2, tiny(), toy(64, 0), toy(20, 1), config, tmp_path / name, progress=False) for name in ("cut", "whole"))
    pd.testing.assert_frame_equal(resumed[NUMBERS], whole[NUMBERS], check_exact=True)
    assert (tmp_path / "cut" / "detector.safetensors").read_bytes() == (tmp_path / "whole" / "detector.safetensors").read_bytes()


def test_what_forbids_children_is_told_with_a_way_on(tmp_path):
    script = """
import sys
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from test_training import quick, tiny, toy
from bcos_nb.batch.plan import count_network
from bcos_nb.training import fit_in_processes
if sys.argv[2] == "counted":
    count_network.__wrapped__("resnet10", None, 0.3, "{}", 64)
else:
    with FakeTensorMode():  # makes torch believe in a GPU; then the first backward pass starts threads
        torch.ones(1)
torch.ones(1, requires_grad=True).sum().backward()
print(len(fit_in_processes(2, tiny(), toy(40, 0), toy(20, 1), quick(epochs=1), sys.argv[1], progress=False)), "epoch")
"""
    ways = [subprocess.run([sys.executable, "-c", script, tmp_path / way, way], cwd=HERE, capture_output=True, text=True) for way in ("counted", "spoilt")]
    assert ways[0].returncode == 0 and ways[0].stdout.endswith("1 epoch\n"), ways[0].stderr
    assert ways[1].returncode == 1 and "Restart the kernel, and train before anything else" in ways[1].stderr


def test_an_interrupt_ends_the_children(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # some packages put their own in its place
    try:
        interrupted(tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)


def interrupted(tmp_path):
    watch = after_the_first_epoch(tmp_path, lambda children: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        fit_in_processes(2, tiny(), toy(64, 0), toy(20, 1), quick(epochs=200), tmp_path, progress=False)
    watch.join()
    assert not children_of(os.getpid()) and not (tmp_path / "detector.safetensors").exists()


# ---- from the notebook, as from the shell

SHELL = """
import sys
import torch
from bcos_nb.data import open_frames, read_catalog
from bcos_nb.models import create_detector
from bcos_nb.training import fit, make_config

root, run_dir = sys.argv[1:]
train, val = (open_frames(read_catalog(root, split=split, compression="c23", frames_per_video=2), 64) for split in ("train", "val"))
torch.manual_seed(5)
detector = create_detector("resnet10", b=2, width=0.25, image_size=64)
fit(detector, train, val, make_config(epochs=2, batch_size=16, seed=5), run_dir, progress=False)
torch.distributed.destroy_process_group()
"""

GRID = dict(
    name="shared", detectors=dict(arch="resnet10", b=2, options=dict(width=0.25)), experiments=["train"],
    training=dict(compression="c23", epochs=2, batch_size=16, seed=5),
)


def test_a_run_in_this_process_has_the_name_that_it_had_before_there_were_others(tmp_path):
    place = dict(data=dict(root="data/miniature", dataset="FaceForensics++", image_size=64, frames_per_video=2))
    job, = preset_jobs(GRID | place, tmp_path)
    assert job.params["processes"] is None
    assert job.run_dir.name == run_name({key: value for key, value in job.params.items() if key != "processes"})
    shared, = preset_jobs(GRID | place | dict(training=GRID["training"] | dict(processes=2)), tmp_path)
    assert shared.params["processes"] == 2 and "processes" not in shared.params["training"] and shared.run_dir.name != job.run_dir.name
    several = preset_jobs(GRID | place | dict(detectors=GRID["detectors"] | dict(product={"training.processes": [1, 2]})), tmp_path)
    assert [one.params["processes"] for one in several] == [1, 2]


@pytest.mark.slow
def test_a_grid_trains_in_two_processes_what_the_shell_trains_in_two(tmp_path):
    forge_dataset(tmp_path / "data", identities=14, frames_per_video=2, size=64, seed=0)
    place = dict(data=dict(root=str(tmp_path / "data"), dataset="FaceForensics++", image_size=64, frames_per_video=2))
    jobs = preset_jobs(GRID | place | dict(detectors=GRID["detectors"] | dict(product={"training.processes": [None, 2]})), tmp_path / "runs")
    table = run_jobs(jobs, kernels=[install_kernels(gpus=[])[0]], progress=False)
    assert set(table.status) == {"done"}, table.error.tolist()
    alone, shared = (job.run_dir for job in jobs)
    (tmp_path / "script.py").write_text(SHELL)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(), str(tmp_path / "script.py"), str(tmp_path / "data"), str(tmp_path / "shell")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    histories = [pd.read_parquet(run / "history.parquet") for run in (shared, tmp_path / "shell", alone)]
    pd.testing.assert_frame_equal(histories[0][NUMBERS], histories[1][NUMBERS], check_exact=True)
    ours, theirs, other = (load_file(run / "detector.safetensors") for run in (shared, tmp_path / "shell", alone))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not all(torch.equal(ours[name], other[name]) for name in other)  # the statistics are of half a batch
    metrics = json.loads((shared / "metrics.json").read_text())
    assert metrics["val_auc"] == pytest.approx(histories[1]["val_auc"].max()) and metrics["best_epoch"] == histories[1]["val_auc"].idxmax() + 1
    executed = (shared / "notebook.ipynb").read_text()
    assert "2 processes" in executed and "epoch 2/2: loss" in executed
