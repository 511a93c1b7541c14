"""Whatever is killed, and whenever: in the end a grid has the scores that it would have had undisturbed, bit for bit."""
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Future

import nbformat
import psutil
import pytest
import yaml

from bcos_nb.batch import install_kernels, is_complete, run_jobs
from bcos_nb.batch.grid_run import outcome_of, plan_jobs
from bcos_nb.batch.runs import finish_run, start_run

KERNEL = install_kernels(gpus=[])[0]
NAMES = ("a", "b", "c")

TRAIN = [  # goes on where it was, as a training does
    "run_dir = ''\nname = ''\nsteps = 6",
    "import hashlib, time\nfrom pathlib import Path\nfrom bcos_nb.batch.runs import finish_run, write_text\nrun, state = Path(run_dir), Path(run_dir, 'state.txt')",
    "value, first = (state.read_text().split() if state.is_file() else (name, 0))\n"
    "for step in range(int(first), steps):\n    time.sleep(0.15)\n    value = hashlib.sha256(value.encode()).hexdigest()\n    write_text(state, f'{value} {step + 1}')",
    "with open(run / 'weights.txt', 'w') as file:\n    for k in range(2000):\n        file.write(hashlib.sha256(f'{value}{k}'.encode()).hexdigest() + '\\n')",
    "finish_run(run, {'value': value})",
]
GAME = [
    "run_dir = ''\nname = ''\ndetector = ''",
    "import hashlib, time\nfrom pathlib import Path\nfrom bcos_nb.batch.runs import find_training, finish_run\nweights = (find_training(detector, run_dir) / 'weights.txt').read_text().split()",
    "assert len(weights) == 2000, 'a half-written training was taken for complete'\ntime.sleep(0.4)\nscores = [int(weight, 16) % 997 / 997 for weight in weights]",
    "with open(Path(run_dir, 'scores.csv'), 'w') as file:\n    for k, score in enumerate(scores):\n        file.write(f'{name},{k},{score!r}\\n')",
    "finish_run(run_dir, {'mean': sum(scores) / len(scores)})",
]

GRID = """
import sys
sys.path.insert(0, sys.argv[1])
from test_kills import grid_of, run_jobs, KERNEL
table = run_jobs(grid_of(sys.argv[2], sys.argv[3]), kernels=[KERNEL] * 2, wait_for_others=True, progress=False)
print(table.to_string())
sys.exit(int((~table.status.isin(["done", "skipped"])).any()))
"""


def written(path, cells):
    content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    content.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(content, path)
    return path


@pytest.fixture
def notebooks(tmp_path):
    (tmp_path / "notebooks").mkdir()
    written(tmp_path / "notebooks" / "train.ipynb", TRAIN)
    written(tmp_path / "notebooks" / "game.ipynb", GAME)
    return tmp_path / "notebooks"


def grid_of(notebooks, runs):
    """A training and a game on it for each name."""
    from pathlib import Path

    notebooks, runs = Path(notebooks), Path(runs)
    trainings = plan_jobs(notebooks / "train.ipynb", {"name": NAMES}, runs / "train")
    games = [plan_jobs(notebooks / "game.ipynb", [{"name": job.params["name"], "detector": f"../../train/{job.run_dir.name}"}], runs / "game", after=[job.run_dir])[0] for job in trainings]
    return trainings + games


def scores(runs, suffixes=(".csv", ".txt")):
    """Every score, weight and metric of the complete runs: file to its bytes' digest."""
    folders = [file.parent for file in runs.glob("*/*/metrics.json")]
    files = [file for folder in folders for file in folder.iterdir() if file.name == "metrics.json" or file.suffix in suffixes]
    return {file.relative_to(runs).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def victims(parent):
    """Processes of a grid by what they are."""
    try:
        workers = psutil.Process(parent.pid).children()
        kernels = [kernel for worker in workers for kernel in worker.children()]
    except psutil.NoSuchProcess:
        return {"parent": [], "worker": [], "kernel": []}
    return {"parent": [psutil.Process(parent.pid)] if parent.poll() is None else [], "worker": workers, "kernel": kernels}


def disturb(start, runs, undisturbed, whom, rng, limit, between=(0.2, 3.0)):
    """Starts a grid again and again, and kills one of `whom` after the other at random moments, until all is done."""
    whom, end, family, grid = list(whom), time.monotonic() + limit, [], start()
    while True:
        assert time.monotonic() < end, f"not done after {limit} s; {len(whom)} were still to be killed"
        wake = time.monotonic() + (rng.uniform(*between) if whom else 1e9)
        while time.monotonic() < wake and grid.poll() is None:
            time.sleep(0.02)
        if grid.poll() is not None:
            said = grid.communicate()[0]
            if grid.returncode == 0:
                break
            assert grid.returncode in (1, -signal.SIGKILL), said
            grid = start()
            continue
        there = victims(grid)
        if not there[whom[0]]:
            continue  # not yet: wait for another while
        family += there["worker"] + there["kernel"]
        rng.choice(there[whom.pop(0)]).kill()
        found = scores(runs)
        assert found == {name: undisturbed[name] for name in found}, "a run counts as complete and is not what it is to be"
    gone, alive = psutil.wait_procs([process for process in family if process.is_running()], timeout=10)
    assert not alive, "kernels or workers were left behind"
    return whom


def check_kills(notebooks, tmp_path, whom, seed, limit):
    table = run_jobs(grid_of(notebooks, tmp_path / "calm"), kernels=[KERNEL] * 2, progress=False)
    assert set(table.status) == {"done"}, table.error.tolist()
    undisturbed, here = scores(tmp_path / "calm"), os.path.dirname(os.path.abspath(__file__))
    assert len(undisturbed) == len(NAMES) * 5

    def start():
        return subprocess.Popen([sys.executable, "-c", GRID, here, str(notebooks), str(tmp_path / "runs")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    disturb(start, tmp_path / "runs", undisturbed, whom, random.Random(seed), limit)
    assert scores(tmp_path / "runs") == undisturbed
    assert not list((tmp_path / "runs").glob("*/*/lock")) and not list((tmp_path / "runs").glob("*/*/failure.json"))
    leftovers = [file.name for file in (tmp_path / "runs").glob("*/*/.*") if not file.name.startswith(".lock")]
    assert not leftovers, leftovers


def test_a_worker_that_dies_when_all_is_done_has_done_it(notebooks, tmp_path):
    whole, half = grid_of(notebooks, tmp_path / "runs")[:2]
    finish_run(start_run(whole.run_dir, "train", whole.params), {"auc": 0.9})
    start_run(half.run_dir, "train", half.params)
    dead = Future()
    dead.set_exception(RuntimeError("The worker process 1 was killed by signal 9."))
    assert outcome_of(dead, whole, 3.0) == {"status": "done", "seconds": 3.0, "error": ""} and not (whole.run_dir / "failure.json").exists()
    assert outcome_of(dead, half, 3.0)["status"] == "failed" and (half.run_dir / "failure.json").is_file()


def test_a_kernel_a_worker_and_the_parent_are_killed(notebooks, tmp_path):
    whom = ["kernel", "worker", "parent"]
    random.Random(7).shuffle(whom)
    check_kills(notebooks, tmp_path, whom, seed=7, limit=240)


def test_of_two_grids_on_one_folder_one_is_killed_and_the_other_does_the_rest(notebooks, tmp_path):
    here = os.path.dirname(os.path.abspath(__file__))
    first, second = (subprocess.Popen([sys.executable, "-c", GRID, here, str(notebooks), str(tmp_path / "runs")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2))
    end = time.monotonic() + 120
    while not (locks := list((tmp_path / "runs").glob("*/*/lock"))) or not any(victims(first)["kernel"]):
        assert time.monotonic() < end and locks is not None
        time.sleep(0.05)
    time.sleep(random.Random(11).uniform(0, 1))
    first.kill()
    first.communicate()
    said = second.communicate(timeout=180)[0]
    assert second.returncode == 0, said
    folders = [file.parent for file in (tmp_path / "runs").glob("*/*/metrics.json")]
    assert len(folders) == 2 * len(NAMES) and not list((tmp_path / "runs").glob("*/*/lock"))
    for name in NAMES:  # six times SHA-256, as the notebook has it
        value = name
        for _ in range(6):
            value = hashlib.sha256(value.encode()).hexdigest()
        assert value in {json.loads((folder / "metrics.json").read_text()).get("value") for folder in folders}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_many_are_killed_at_random_moments(notebooks, tmp_path, seed):
    whom = random.Random(100 + seed).choices(["kernel", "worker", "parent"], k=10)
    check_kills(notebooks, tmp_path, whom, seed, limit=900)


TINY = """
name: tiny
data: {root: %s, dataset: FaceForensics++, image_size: 64, frames_per_video: 2, forge: {identities: 14, frames_per_video: 2, size: 64, seed: 0}}
detectors: {arch: resnet10, b: [null, 2], options: {width: 0.25}}
training: {compression: c23, epochs: 3, batch_size: 16, lr: 1.0e-3}
games: {explainers: [bcos, gradcam], compression: c23, thresholds: [0.0, 0.5]}
experiments: [train, mask_game]
"""


@pytest.mark.slow
def test_trainings_and_games_of_a_disturbed_grid_are_those_of_a_calm_one(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY % (tmp_path / "data"))
    assert yaml.safe_load((tmp_path / "tiny.yaml").read_text())["name"] == "tiny"

    def start(runs="runs"):
        command = [sys.executable, "-c", "from bcos_nb.cli import main; main()", "run", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / runs), "--retry-failed"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    calm = start("calm")
    said = calm.communicate(timeout=900)[0]
    assert calm.returncode == 0, said
    suffixes = (".parquet", ".safetensors")

    def table(runs):  # but for how long things took
        found = scores(tmp_path / runs, suffixes)
        metrics = {name: json.loads((tmp_path / runs / name).read_text()) for name in found if name.endswith("metrics.json")}
        return {name: digest for name, digest in found.items() if name not in metrics and not name.endswith("history.parquet")}, {
            name: {key: value for key, value in content.items() if key != "seconds"} for name, content in metrics.items()}

    undisturbed = table("calm")
    assert len(undisturbed[0]) >= 2 * 1 + 2 * 3 and len(undisturbed[1]) == 4
    rng, whom, grid, end = random.Random(3), ["kernel", "parent", "worker", "kernel", "parent"], start(), time.monotonic() + 1200
    while grid.poll() != 0:
        assert time.monotonic() < end
        if grid.poll() is not None:
            grid.communicate()
            grid = start()
        time.sleep(rng.uniform(2, 12))
        there = victims(grid)
        if whom and there[whom[0]]:
            rng.choice(there[whom.pop(0)]).kill()
    assert not whom, f"done before {whom} could be killed"
    assert table("runs") == undisturbed
    assert all(is_complete(folder) for folder in (tmp_path / "runs").glob("*/*_game*"))
