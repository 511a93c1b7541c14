"""A grid on a Dask cluster: a real scheduler and worker processes on this machine, some of which are killed; and what Slurm is asked for."""
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import psutil
import pytest

from bcos_nb.batch import cluster, install_kernels, plan_jobs, run_jobs
from bcos_nb.batch.cluster import open_cluster, outlast, read_slurm, run_on_worker, silent_for, slots_of, slurm_cluster, take_away, take_gpu, take_silent
from bcos_nb.batch.grid_run import run_notebook
from bcos_nb.batch.runs import WORKER, is_complete, lock_run, read_json, write_json

pytest.importorskip("distributed")
KERNEL = install_kernels(gpus=[])[0]


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """Notes its process number and a line in a log, computes scores from a seed, waits, finishes."""
    cells = [
        "run_dir = ''\nseed = 0\nseconds = 0.0\nlog = ''\ndies = False",
        "import os, time\nfrom pathlib import Path\nimport numpy as np\nfrom bcos_nb.batch.runs import finish_run, report_progress\n"
        "if log:\n    os.write(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), f'{seed} {os.getpid()} {time.time()}\\n'.encode())\n"
        "Path(run_dir, 'pid').write_text(str(os.getpid()))\nif dies:\n    os.kill(os.getppid(), 9)\n"
        "end = time.monotonic() + seconds\nwhile time.monotonic() < end:\n    time.sleep(0.1)\n    report_progress(run_dir, 'waiting', 0.5)",
        "draw = np.random.default_rng(seed)\nscores = np.linalg.svd(draw.normal(size=(60, 60)).astype('float32') @ draw.normal(size=(60, 60)).astype('float32'))[1]\n"
        "np.save(Path(run_dir, 'scores.npy'), scores)\n"
        "if log:\n    os.write(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), f'{seed} done {time.time()}\\n'.encode())\n"
        "finish_run(run_dir, {'largest': float(scores[0]), 'threads': os.environ['OMP_NUM_THREADS'], 'gpu': os.environ.get('CUDA_VISIBLE_DEVICES')})",
    ]
    content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    content.cells[0].metadata["tags"] = ["parameters"]
    path = tmp_path_factory.mktemp("notebook") / "small.ipynb"
    nbformat.write(content, path)
    return path


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


class Cluster:
    """`dask scheduler` and `dask worker`, as a person would start them."""

    def __init__(self, folder):
        self.folder, self.processes = folder, []
        self.file = folder / "scheduler.json"
        self.start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--dashboard-address", ":0", "--no-jupyter", "--scheduler-file", str(self.file))

    def start(self, what, *options, environment=None):
        log = open(self.folder / f"{what}-{len(self.processes)}.log", "w")
        process = subprocess.Popen([sys.executable, "-m", f"distributed.cli.dask_{what}", *options], stdout=log, stderr=log, env=os.environ | (environment or {}))
        self.processes.append(process)
        return process

    def worker(self, *options, resources="CPU=1", threads=1, environment=None):
        wait_until(self.file.exists)
        options += ("--resources", resources) if resources else ()
        return self.start("worker", "--scheduler-file", str(self.file), "--nthreads", str(threads), "--no-nanny", "--no-dashboard", "--death-timeout", "60",
                          "--local-directory", str(self.folder), *options, environment=environment)

    @property
    def address(self):
        return json.loads(wait_until(self.file.exists) and self.file.read_text())["address"]

    def end(self):
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def a_cluster(folder):
    started = Cluster(folder)
    try:
        yield started
    finally:
        started.end()


def starts(log):
    """Seed to the processes that began it, from the log."""
    found = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        seed, what, _ = line.split()
        if what != "done":
            found.setdefault(int(seed), []).append(int(what))
    return found


def run_on(executor, jobs, **options):
    return run_jobs(jobs, executor=executor, kernels=["the worker's own"], at_once=len(jobs), progress=False, **options)


def scores_of(jobs):
    return [(job.run_dir / "scores.npy").read_bytes() for job in jobs]


def test_a_worker_killed_while_running_changes_no_score(notebook, tmp_path):
    """Two workers, three runs, one worker killed with -9: its run starts again on the other; the default pool gives the same bytes."""
    log, said = tmp_path / "log", []
    rows = [{"seed": seed, "seconds": 2.0, "log": str(log)} for seed in range(3)]
    jobs = plan_jobs(notebook, rows, tmp_path / "there")
    with a_cluster(tmp_path) as started:
        for _ in range(2):
            started.worker()
        with open_cluster(started.address, tmp_path, said.append, seconds=180) as executor:
            wait_until(lambda: executor.slots() == 2)
            result = {}
            grid = threading.Thread(target=lambda: result.update(table=run_on(executor, jobs)))
            grid.start()
            wait_until(lambda: len(starts(log)) >= 2)
            victim = starts(log)[0][0]
            worker = next(parent for parent in psutil.Process(victim).parents() if parent.pid in [process.pid for process in started.processes])
            worker.kill()
            grid.join(timeout=120)
        table = result["table"]
    assert table.status.tolist() == ["done"] * 3, table.error.tolist()
    counts = {seed: len(pids) for seed, pids in starts(log).items()}
    assert counts == {0: 2, 1: 1, 2: 1}, "only the lost run was begun twice"
    assert not psutil.pid_exists(victim)
    assert any("is gone" in line for line in said) and any("starts again elsewhere" in line for line in said)
    assert not [file for file in tmp_path.glob("*/*/*lock*") if file.name != ".lock.guard"] and not list(tmp_path.glob(".shared-*"))
    here = plan_jobs(notebook, [row | {"seconds": 0.0, "log": ""} for row in rows], tmp_path / "here")
    assert run_jobs(here, kernels=[KERNEL], progress=False).status.tolist() == ["done"] * 3
    assert scores_of(jobs) == scores_of(here)
    metrics = [read_json(job.run_dir / "metrics.json") for job in jobs]
    assert [one["largest"] for one in metrics] == [read_json(job.run_dir / "metrics.json")["largest"] for job in here]
