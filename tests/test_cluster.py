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
from bcos_nb.batch.cluster import OwnLock, open_cluster, outlast, read_slurm, slots_of, slurm_cluster, take_away, take_gpu
from bcos_nb.batch.runs import WORKER, lock_run, read_json, unlock_run, write_json

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


@pytest.mark.slow
def test_a_run_whose_workers_are_lost_twice_fails_with_the_reason(notebook, tmp_path):
    log = tmp_path / "log"
    job, other = plan_jobs(notebook, [{"seed": 0, "seconds": 30.0, "log": str(log)}, {"seed": 1, "log": str(log)}], tmp_path / "runs")
    with a_cluster(tmp_path) as started:
        for _ in range(3):
            started.worker()
        with open_cluster(started.address, tmp_path, seconds=180) as executor:
            wait_until(lambda: executor.slots() == 3)
            result = {}
            grid = threading.Thread(target=lambda: result.update(table=run_on(executor, [job, other])))
            grid.start()
            for attempt in (1, 2):
                wait_until(lambda: len(starts(log).get(0, [])) == attempt)
                kernel = starts(log)[0][-1]
                next(parent for parent in psutil.Process(kernel).parents() if parent.pid in [process.pid for process in started.processes]).kill()
                wait_until(lambda: not psutil.pid_exists(kernel))
            grid.join(timeout=120)
    table = result["table"]
    assert table.status.tolist() == ["failed", "done"]
    assert "lost twice" in table.error[0] and "lost twice" in read_json(job.run_dir / "failure.json")["error"]
    assert len(starts(log)[0]) == 2 and not (job.run_dir / "lock").exists()


@pytest.mark.slow
def test_a_process_that_dies_on_a_worker_fails_its_run_only(notebook, tmp_path):
    """Out of memory, most likely: that would happen elsewhere too, so it is not started again; the worker goes on."""
    jobs = plan_jobs(notebook, [{"seed": 0, "dies": True}, {"seed": 1}], tmp_path / "runs")
    with a_cluster(tmp_path) as started:
        started.worker()
        with open_cluster(started.address, tmp_path, seconds=180) as executor:
            table = run_on(executor, jobs)
    assert table.status.tolist() == ["failed", "done"] and "killed by signal 9" in table.error[0]
    assert not (jobs[0].run_dir / "lock").exists()


GRID = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from bcos_nb.batch import plan_jobs, run_jobs
from bcos_nb.batch.cluster import open_cluster
address, notebook, out, log = sys.argv[1:]
jobs = plan_jobs(notebook, [{"seed": seed, "seconds": 60.0, "log": log} for seed in range(2)], out)
with open_cluster(address, seconds=180) as executor:
    run_jobs(jobs, executor=executor, kernels=["any"], at_once=2, progress=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_grid_that_ends_takes_its_runs_on_workers_with_it(notebook, tmp_path, how):
    log = tmp_path / "log"
    with a_cluster(tmp_path) as started:
        workers = [started.worker(), started.worker()]
        grid = subprocess.Popen([sys.executable, "-c", GRID, started.address, str(notebook), str(tmp_path / "runs"), str(log)], stderr=subprocess.DEVNULL)
        wait_until(lambda: len(starts(log)) == 2)
        kernels = [pid for pids in starts(log).values() for pid in pids]
        grid.send_signal(how)
        grid.wait(timeout=60)
        wait_until(lambda: not any(map(psutil.pid_exists, kernels)), 30)
        wait_until(lambda: not list(tmp_path.glob("runs/*/lock")), 30)
        assert all(worker.poll() is None for worker in workers), "the workers live on, for the next grid"


@pytest.mark.slow
def test_a_scheduler_that_ends_is_told(notebook, tmp_path):
    job, = plan_jobs(notebook, [{"seed": 0, "seconds": 60.0, "log": str(tmp_path / "log")}], tmp_path / "runs")
    with a_cluster(tmp_path) as started:
        started.worker()
        with open_cluster(started.address, tmp_path, seconds=180) as executor:
            result = {}
            grid = threading.Thread(target=lambda: result.update(table=run_on(executor, [job])))
            grid.start()
            kernel = wait_until(lambda: starts(tmp_path / "log"))[0][0]
            started.processes[0].kill()
            grid.join(timeout=120)
            assert result["table"].status.tolist() == ["failed"] and "connection to the cluster's scheduler is lost" in result["table"].error[0]
            wait_until(lambda: not psutil.pid_exists(kernel))


@pytest.mark.slow
def test_gpus_are_given_one_to_a_run(notebook, tmp_path):
    """Four runs at once on two machines' worth of workers: two workers that share two GPUs, and one with two threads and two GPUs."""
    jobs = plan_jobs(notebook, [{"seed": seed, "seconds": 5.0, "log": str(tmp_path / "log")} for seed in range(4)], tmp_path / "runs")
    with a_cluster(tmp_path) as started:
        for _ in range(2):
            started.worker(resources="GPU=1", environment={"CUDA_VISIBLE_DEVICES": "GPU-test-a,GPU-test-b"})
        started.worker(resources="GPU=2", threads=2, environment={"CUDA_VISIBLE_DEVICES": "GPU-test-c,GPU-test-d"})
        started.worker(resources="GPU=1", environment={"CUDA_VISIBLE_DEVICES": ""})  # declares what it has not
        said = []
        with open_cluster(started.address, tmp_path, said.append, seconds=180) as executor:
            wait_until(lambda: executor.slots() == 4 and executor.refused)
            assert "declares GPU=1 but sees 0" in next(iter(executor.refused.values()))
            assert run_on(executor, jobs).status.tolist() == ["done"] * 4
    assert sorted(read_json(job.run_dir / "metrics.json")["gpu"] for job in jobs) == ["GPU-test-a", "GPU-test-b", "GPU-test-c", "GPU-test-d"]


# Without a cluster


TOLD = {"host": "node7", "version": cluster.bcos_nb.__version__, "gpus": [], "shared": True, "writable": True}


@pytest.mark.parametrize("declared, told, said", [
    ({"nthreads": 8, "resources": {}}, {}, "has 8 threads and declares no resources.*--nthreads 1 --nworkers N --resources CPU=1"),
    ({"nthreads": 1, "resources": {}}, {"gpus": ["0"]}, "sees 1 GPUs and declares none.*GPU=1"),
    ({"nthreads": 1, "resources": {"GPU": 2.0}}, {"gpus": ["0", "1"]}, "with 1 thread.*Start 2 workers"),
    ({"nthreads": 4, "resources": {"GPU": 4.0}}, {"gpus": ["0"]}, "declares GPU=4 but sees 1"),
    ({"nthreads": 1, "resources": {"CPU": 1.0}}, {"version": "0.0.1"}, "Use the same installation"),
    ({"nthreads": 1, "resources": {"CPU": 1.0}}, {"shared": False}, "does not see the folder"),
    ({"nthreads": 1, "resources": {"CPU": 1.0}}, {"writable": False}, "cannot write to the folder"),
])
def test_workers_that_cannot_be_used_are_refused_with_what_to_start(declared, told, said):
    with pytest.raises(ValueError, match=said):
        slots_of(declared, TOLD | told, "tcp://here:8786")


def test_slots_are_what_a_worker_declares():
    assert slots_of({"nthreads": 1, "resources": {}}, TOLD, "") == (None, 1)
    assert slots_of({"nthreads": 3, "resources": {"CPU": 3.0}}, TOLD, "") == ("CPU", 3)
    assert slots_of({"nthreads": 1, "resources": {"GPU": 1.0, "CPU": 1.0}}, TOLD | {"gpus": ["0"]}, "") == ("GPU", 1)


def test_a_gpu_is_free_again_when_its_holder_is_killed(tmp_path):
    name = f"GPU-{tmp_path.name}"
    code = f"import time; from bcos_nb.batch.cluster import take_gpu\nwith take_gpu([{name!r}]):\n    print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline().strip() == "held"
    with pytest.raises(RuntimeError, match="are taken by other runs"), take_gpu([name], seconds=0):
        pass
    holder.kill()
    with take_gpu([name], seconds=20) as gpu:
        assert gpu == name
    holder.wait()


def test_the_lock_of_a_lost_attempt_is_taken_away_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv(WORKER, "attempt 1")
    lock = lock_run(tmp_path)
    assert take_away(lock, "attempt 2") is None and lock.exists()
    assert take_away(lock, "attempt 1")["pid"] == os.getpid() and not lock.exists() and take_away(lock, "attempt 1") is None
    monkeypatch.delenv(WORKER)
    mine = lock_run(tmp_path)
    assert take_away(mine, "attempt 1") is None and take_away(mine, "") is None and mine.exists()
    unlock_run(mine)


def test_a_run_that_lost_its_lock_is_ended(tmp_path):
    """What a machine does that was cut off, while its run has been given to another."""
    lost, lock = threading.Event(), lock_run(tmp_path)
    with OwnLock(tmp_path, lost.set, every=0.05):
        time.sleep(0.3)
        assert not lost.is_set()
        write_json(lock, read_json(lock) | {"host": "another machine", "token": "other"})
        assert lost.wait(20)


def test_a_run_that_gave_its_lock_back_is_not(tmp_path):
    lost, lock = threading.Event(), lock_run(tmp_path)
    with OwnLock(tmp_path, lost.set, every=0.05):
        time.sleep(0.3)
        unlock_run(lock)
        time.sleep(0.2)
    time.sleep(1.2)
    assert not lost.is_set()


def test_a_second_attempt_waits_for_the_first_on_its_machine_to_be_dead(tmp_path, monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    here = {"pid": child.pid, "host": socket.gethostname(), "began": psutil.Process(child.pid).create_time()}
    outlast(here)
    child.wait(timeout=20)
    assert not psutil.pid_exists(here["pid"])
    begin = time.monotonic()
    outlast(here), outlast(None)
    assert time.monotonic() - begin < 1
    monkeypatch.setattr(cluster, "LOOK", 0.2)
    outlast(here | {"host": "another machine"})
    assert time.monotonic() - begin >= 0.4


@pytest.mark.parametrize("target, said", [("cluster7", "neither the address"), ("nowhere.yaml", "does not exist")])
def test_a_cluster_that_is_none_is_refused(target, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        open_cluster(target)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(cluster, "import_module", missing)
    with pytest.raises(ImportError, match=r'pip install "bcos_nb\[cluster\]"'):
        open_cluster("tcp://127.0.0.1:1")


def test_nothing_of_dask_is_imported_before_a_cluster_is_named():
    code = "import sys, bcos_nb.batch.cluster, bcos_nb.cli; print([name for name in sys.modules if name.partition('.')[0] in ('dask', 'distributed', 'dask_jobqueue')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# Slurm


SLURM = "queue: gpu_4\njobs: 2\ncores: 10\ngpus: 1\nmemory: 90GB\nwalltime: '24:00:00'\n"


@pytest.mark.parametrize("change, said", [
    (("queue: gpu_4\n", ""), "lacks queue"), (("jobs: 2", "jobs: 0"), "jobs is 0; at least 1"), (("'24:00:00'", "24:00:00"), "in quotation marks"),
    (("90GB", "much"), "memory is 'much'"), (("'24:00:00'", "'a day'"), "walltime is 'a day'"), (("cores: 10", "cores: ten"), "cores is 'ten'; expected was a whole number"),
    (("gpus: 1", "gpu: 1"), "unknown key 'gpu'"), (("gpus: 1", "gpus: 2\nworkers: 3"), "3 workers for 2 GPUs"), (("cores: 10\ngpus: 1", "cores: 2\nworkers: 4"), "4 workers on 2 cores"),
    ((SLURM, "- queue"), "list; the keys queue"), (("gpus: 1", "job_extra_directives: --exclusive"), "expected was a list"),
])
def test_a_wrong_slurm_file_is_refused_before_anything_is_submitted(tmp_path, change, said):
    file = tmp_path / "slurm.yaml"
    file.write_text(SLURM.replace(*change))
    with pytest.raises(ValueError, match=said):
        read_slurm(file)


def test_slurm_is_asked_for_what_the_file_says(tmp_path):
    pytest.importorskip("dask_jobqueue")
    file = tmp_path / "slurm.yaml"
    file.write_text(SLURM.replace("gpus: 1", "gpus: 4") + "job_script_prologue: [module load devel/cuda]\njob_extra_directives: [--exclusive]\nlocal_directory: $TMPDIR\n")
    asked = slurm_cluster(read_slurm(file))
    try:
        script = asked.job_script()
    finally:
        asked.close()
    for line in ("#SBATCH -p gpu_4", "#SBATCH --gres=gpu:4", "#SBATCH --cpus-per-task=10", "#SBATCH --mem=84G", "#SBATCH -t 24:00:00", "#SBATCH --exclusive", "module load devel/cuda"):
        assert line in script.splitlines(), script
    command = script.splitlines()[-1]
    for option in ("--nthreads 1", "--nworkers 4", "--resources GPU=1", "--local-directory $TMPDIR"):
        assert option in command


# Slurm's part played by a shell script

SBATCH = """#!/bin/bash
script="{folder}/job-$$.sh"
cp "${{@: -1}}" "$script"
setsid bash "$script" > "$script.log" 2>&1 &
echo $! >> "{folder}/submitted"
echo "Submitted batch job $!"
"""
SCANCEL = """#!/bin/bash
echo "$@" >> "{folder}/cancelled"
for job in "$@"; do kill -- -"$job" 2>/dev/null; done
exit 0
"""


def play_slurm(folder, **commands):
    """Puts commands of these names first on a PATH."""
    place = folder / "bin"
    place.mkdir()
    for name, script in commands.items():
        (place / name).write_text(script.format(folder=folder))
        (place / name).chmod(0o755)
    return f"{place}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.slow
def test_a_grid_on_jobs_that_slurm_is_asked_for(notebook, tmp_path, monkeypatch):
    pytest.importorskip("dask_jobqueue")
    monkeypatch.setenv("PATH", play_slurm(tmp_path, sbatch=SBATCH, scancel=SCANCEL))
    (tmp_path / "slurm.yaml").write_text(f"queue: any\njobs: 2\ncores: 1\nmemory: 2GB\nwalltime: '1:00:00'\nlocal_directory: {tmp_path}\n")
    jobs, said = plan_jobs(notebook, [{"seed": seed, "seconds": 1.0, "log": str(tmp_path / "log")} for seed in range(3)], tmp_path / "runs"), []
    with open_cluster(str(tmp_path / "slurm.yaml"), tmp_path, said.append) as executor:
        table = run_on(executor, jobs)
    assert table.status.tolist() == ["done"] * 3 and {seed: len(pids) for seed, pids in starts(tmp_path / "log").items()} == {0: 1, 1: 1, 2: 1}
    assert len((tmp_path / "submitted").read_text().split()) == 2 and "Asked Slurm for 2 jobs" in said[0]
    wait_until(lambda: not any(psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE for pid in (tmp_path / "submitted").read_text().split()))


@pytest.mark.slow
def test_the_sbatch_script_does_a_whole_grid(notebook, tmp_path):
    """As it is shipped, with module, workspaces and srun played by scripts of a line."""
    from bcos_nb.resources import resource_path

    workspace = tmp_path / "workspace"
    workspace.mkdir()
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    for name, code in {"bcos-nb": "from bcos_nb.cli import main; main()", "dask": "from dask.__main__ import main; main()"}.items():
        (venv / name).write_text(f"#!{sys.executable}\nif __name__ == '__main__':\n    {code}\n")
        (venv / name).chmod(0o755)
    path = play_slurm(
        tmp_path, module="#!/bin/bash\necho \"$@\" > {folder}/loaded\n", ws_find="#!/bin/bash\nexit 1\n", ws_allocate=f"#!/bin/bash\necho {workspace}\n",
        srun='#!/bin/bash\n"$@" &\n"$@" &\nwait\n',
    )
    rows = [{"seed": seed, "log": str(tmp_path / "log")} for seed in range(3)]
    (tmp_path / "grid.yaml").write_text(json.dumps({"notebook": str(notebook), "grid": rows, "out": str(workspace / "runs")}))
    script = resource_path("data/presets/cluster/study.sbatch")
    done = subprocess.run(
        ["bash", str(script), str(tmp_path / "grid.yaml")], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PATH": path, "VENV": str(venv.parent), "SLURM_JOB_ID": "7", "INTERFACE": "lo", "RESOURCES": "CPU=1", "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All 3 runs" in done.stdout and (tmp_path / "loaded").read_text().startswith("load")
    assert sorted(starts(tmp_path / "log")) == [0, 1, 2] and len(list(workspace.glob("runs/*/metrics.json"))) == 3


# A real grid


@pytest.mark.slow
def test_trainings_and_games_on_a_cluster_have_the_scores_of_the_default_pool(tmp_path):
    """Two detectors, trained and played with on two workers, one of which is killed during a training: every score and weight is the same, bit for bit."""
    import yaml

    from bcos_nb.batch.presets import load_preset, preset_jobs
    from bcos_nb.data import forge_dataset

    forge_dataset(tmp_path / "data", identities=20, frames_per_video=2, size=64, methods=["Deepfakes"], compressions=["c23"], seed=0)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({
        "data": {"root": str(tmp_path / "data"), "dataset": "FaceForensics++", "image_size": 64, "frames_per_video": 2},
        "detectors": {"arch": "resnet10", "b": [None, 2], "options": {"width": 0.125}},
        "training": {"compression": "c23", "seed": 0, "epochs": 3, "batch_size": 8, "save_every": 1}, "evaluation": {"compressions": ["c23"]},
        "games": {"explainers": ["bcos", "gradcam"], "measures": ["weighted"], "compression": "c23", "thresholds": [0.0, 0.5]},
    }))
    preset = load_preset(tmp_path / "small.yaml")
    there, here = (preset_jobs(preset, tmp_path / name, experiments=["mask_game"]) for name in ("there", "here"))
    with a_cluster(tmp_path) as started:
        for _ in range(2):
            started.worker()
        said = []
        with open_cluster(started.address, tmp_path, said.append, seconds=180) as executor:
            wait_until(lambda: executor.slots() == 2)
            result = {}
            grid = threading.Thread(target=lambda: result.update(table=run_on(executor, there)))
            grid.start()
            saved = wait_until(lambda: [file for file in tmp_path.glob("there/train/*/state/last.pt") if (file.parents[1] / "lock").exists()], 240)[0]
            writer = psutil.Process(read_json(saved.parents[1] / "lock")["pid"])
            next(parent for parent in writer.parents() if parent.pid in [process.pid for process in started.processes]).kill()
            grid.join(timeout=500)
    assert result["table"].status.tolist() == ["done"] * 4, result["table"].error.tolist()
    assert any("starts again elsewhere" in line for line in said)
    assert run_jobs(here, kernels=[KERNEL], progress=False).status.tolist() == ["done"] * 4
    for one, other in zip(there, here):
        name = "detector.safetensors" if one.notebook.stem == "train" else "scores.parquet"
        assert (one.run_dir / name).read_bytes() == (other.run_dir / name).read_bytes(), one.label
