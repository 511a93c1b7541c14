"""Runs and grids of runs: names, locks, completeness, and what is left when something is killed."""
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import nbformat
import psutil
import pytest

from bcos_nb.batch import install_kernels, plan_jobs, run_grid, run_jobs, run_name
from bcos_nb.batch import runs as rooms
from bcos_nb.batch.execution import Watch, kernel_address, read_failure, watched_manager
from bcos_nb.batch.runs import RunBusy, finish_run, is_complete, lock_run, publish_run, read_progress, report_progress, unlock_run, write_json

KERNEL = install_kernels(gpus=[])[0]


@pytest.fixture
def notebook(tmp_path):
    """Writes its process number, waits for a file or some seconds, appends to a log, fails when told to, finishes."""
    cells = [
        "run_dir = ''\nb = 1.0\nseconds = 0.0\nfails = ''\nlog = ''",
        "import os, time\nfrom pathlib import Path\nfrom bcos_nb.batch.runs import finish_run, report_progress\n"
        "Path(run_dir, 'pid').write_text(str(os.getpid()))\nreport_progress(run_dir, 'half way', 0.5)\ntime.sleep(seconds)",
        "if fails == 'dies':\n    os._exit(3)\nif fails == 'late':\n    finish_run(run_dir, {'b': b})\nif fails:\n    raise ValueError('first line\\nlast line of ' + fails)",
        "Path(run_dir, 'scores.txt').write_text(str(b) * 1000)\nif log:\n    os.write(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), f'{b}\\n'.encode())\n"
        "finish_run(run_dir, {'square': b ** 2, 'threads': os.environ['OMP_NUM_THREADS']})",
    ]
    content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    content.cells[0].metadata["tags"] = ["parameters"]
    path = tmp_path / "small.ipynb"
    nbformat.write(content, path)
    return path


def wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def metrics_of(folder):
    return {file.parent.name: json.loads(file.read_text()) for file in folder.glob("*/metrics.json")}


def test_a_full_disk_is_told_with_what_to_do(tmp_path, monkeypatch):
    """As the system tells it: once while the notebook runs, once while the lock is written."""
    from bcos_nb.batch import execution

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for name in ("execute_into", "lock_run"):
        with monkeypatch.context() as patch:
            patch.setattr(execution, name, lambda *_: (_ for _ in ()).throw(full))
            told = execution.run_notebook(dict(notebook="x.ipynb", params={}, run_dir=str(tmp_path / name), kernel=KERNEL))
        assert told["status"] == "failed" and "Make room, or give --out a folder on another disk" in told["error"] and name in told["error"]
    assert not (tmp_path / "execute_into" / "lock").exists()


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_runs(tmp_path):
    from bcos_nb.batch.status import write_grid

    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="Runs cannot be written to .*file/runs: Not a directory. Give --out"):
        write_grid([], tmp_path / "file" / "runs")


def test_a_part_of_a_grid_remembers_the_whole(notebook, tmp_path):
    from bcos_nb.batch.status import read_grid, write_grid

    jobs = plan_jobs(notebook, {"b": [1, 2, 3]}, tmp_path / "runs" / "small")
    content = json.loads(write_grid(jobs[1:2], tmp_path / "runs", jobs).read_text())
    assert [row["asked"] for row in content] == [True, False, False] and len({row["run"] for row in content}) == 3
    assert [job.run_dir for job in read_grid(tmp_path / "runs")] == [jobs[1].run_dir], "a status shows what was asked for"


# Names and grids


def test_a_product_has_every_combination_once(notebook, tmp_path):
    grid = {"b": [1, 1.25, 2], "seconds": [0, 1]}
    rows = [(job.params["b"], job.params["seconds"]) for job in plan_jobs(notebook, grid, tmp_path / "out")]
    assert rows == list(itertools.product(*grid.values()))
    assert len({job.run_dir for job in plan_jobs(notebook, grid, tmp_path / "out")}) == 6


def test_the_name_depends_on_parameters_and_on_nothing_else():
    name = run_name({"arch": "resnet10", "b": 1.75, "compression": "c23", "options": {"x": [1, 2]}})
    assert name.startswith("resnet10-b1.75-c23-") and len(name.rsplit("-", 1)[1]) == 6
    assert name == run_name({"options": {"x": (1.0, 2)}, "compression": "c23", "b": 1.75, "arch": "resnet10", "unset": None})
    others = [{"b": 2}, {"b": None}, {"compression": "c40"}, {"options": {"x": [2, 1]}}, {"seed": 1}]
    base = {"arch": "resnet10", "b": 1.75, "compression": "c23", "options": {"x": [1, 2]}}
    assert len({run_name(base | other) for other in others} | {name}) == 6
    assert run_name(base | {"b": None}).startswith("resnet10-ordinary-c23-")
    seed = subprocess.run(  # another process, another hash seed
        [sys.executable, "-c", f"from bcos_nb.batch import run_name; print(run_name({base!r}))"], capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "7"}
    )
    assert seed.stdout.strip() == name


def test_a_default_that_changes_makes_another_run(notebook, tmp_path):
    before, = plan_jobs(notebook, [{"b": 2}], tmp_path)
    notebook.write_text(notebook.read_text().replace("seconds = 0.0", "seconds = 0.5"))
    after, = plan_jobs(notebook, [{"b": 2}], tmp_path)
    assert before.run_dir != after.run_dir


@pytest.mark.parametrize("grid, said", [({"B": [1]}, "no parameter 'B'; it has b, seconds"), ({"b": 2}, "a list of values was expected")])
def test_a_wrong_grid_is_refused_before_anything_runs(notebook, tmp_path, grid, said):
    with pytest.raises(ValueError, match=said):
        run_grid(notebook, grid, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_notebook_that_is_none_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.ipynb does not exist"):
        run_grid(tmp_path / "missing.ipynb", {"b": [1]}, tmp_path)
    (tmp_path / "text.ipynb").write_text("half of a note")
    with pytest.raises(ValueError, match="is not a notebook"):
        run_grid(tmp_path / "text.ipynb", {"b": [1]}, tmp_path)
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "empty.ipynb")
    with pytest.raises(ValueError, match="0 cells tagged 'parameters'"):
        run_grid(tmp_path / "empty.ipynb", {"b": [1]}, tmp_path)


# Complete or not


def test_metrics_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    write_json(tmp_path / "metrics.json", {"auc": 0.5})

    def out_of_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rooms.os, "fsync", out_of_space)
    with pytest.raises(OSError):
        write_json(tmp_path / "metrics.json", {"auc": 0.9})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"auc": 0.5}
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


def test_metrics_are_published_after_every_other_file_is_on_the_disk(tmp_path, monkeypatch):
    (tmp_path / "scores.parquet").write_text("scores")
    monkeypatch.setenv(rooms.IN_GRID, str(tmp_path.resolve()))
    finish_run(tmp_path, {"auc": float("nan"), "eer": 0.1})
    assert not is_complete(tmp_path)
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(rooms.os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")) if sys.platform == "linux" else None, fsync(fd)))
    monkeypatch.setattr(rooms.os, "replace", lambda *names: (events.append("published"), replace(*names)))
    publish_run(tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"auc": None, "eer": 0.1}
    if sys.platform == "linux":
        assert events.index(str(tmp_path / "scores.parquet")) < events.index("published")


def test_progress_is_noted_and_read(tmp_path):
    assert read_progress(tmp_path) == ("", None)
    report_progress(tmp_path, "epoch 2/4", 0.4)
    assert read_progress(tmp_path) == ("epoch 2/4", 0.4)


# Locks


def test_a_run_has_one_writer(tmp_path):
    lock = lock_run(tmp_path / "run")
    with pytest.raises(RunBusy, match=rf"written by process {os.getpid()} on .*kill {os.getpid()}"):
        lock_run(tmp_path / "run")
    unlock_run(lock)
    unlock_run(lock_run(tmp_path / "run"))


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    code = "import os, sys; from bcos_nb.batch.runs import lock_run; lock_run(sys.argv[1]); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    assert (tmp_path / "lock").exists()
    lock = lock_run(tmp_path)
    assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_a_process_number_used_again_does_not_keep_a_lock_alive(tmp_path):
    lock = lock_run(tmp_path)
    write_json(lock, json.loads(lock.read_text()) | {"pid": os.getppid(), "began": 12345.0})
    lock_run(tmp_path)


def test_the_lock_of_another_machine_is_respected(tmp_path):
    lock = lock_run(tmp_path)
    write_json(lock, json.loads(lock.read_text()) | {"host": "another-machine", "pid": 2**22 + 1})
    with pytest.raises(RunBusy, match="on another-machine.*delete"):
        lock_run(tmp_path)
    unlock_run(lock)
    assert lock.exists()


def test_the_lock_of_another_machine_that_has_long_been_silent_is_taken_over(tmp_path):
    lock = lock_run(tmp_path)
    write_json(lock, json.loads(lock.read_text()) | {"host": "another-machine", "pid": 2**22 + 1})
    long_ago = time.time() - rooms.SILENT - 60
    os.utime(lock, (long_ago, long_ago))
    assert json.loads(lock_run(tmp_path).read_text())["pid"] == os.getpid()


def test_a_writer_shows_that_it_lives_and_stops_when_it_has_given_the_run_back(tmp_path, monkeypatch):
    monkeypatch.setattr(rooms, "BEAT", 0.05)
    lock = lock_run(tmp_path)
    os.utime(lock, (1e9, 1e9))
    wait_until(lambda: time.time() - lock.stat().st_mtime < 10)
    unlock_run(lock)
    lock.write_text("{}")  # somebody else's
    os.utime(lock, (1e9, 1e9))
    time.sleep(0.3)
    assert lock.stat().st_mtime == 1e9


# Kernels


@pytest.mark.skipif(os.name != "posix", reason="Unix sockets")
def test_kernels_share_no_addresses_and_no_ports(tmp_path):
    managers = [watched_manager(Watch())(kernel_name=KERNEL) for _ in range(50)]
    assert len({manager.ip for manager in managers}) == 50 and {manager.transport for manager in managers} == {"ipc"}
    assert all(len(f"{kernel_address()['ip']}-5") < 104 for _ in range(3))


def test_kernels_bind_gpus_and_threads(tmp_path):
    def spec(name):
        return json.loads((tmp_path / "share/jupyter/kernels" / name / "kernel.json").read_text())

    names = install_kernels(tmp_path, gpus=3)
    assert names == ["bcos-nb-gpu0", "bcos-nb-gpu1", "bcos-nb-gpu2"]
    assert [spec(name)["env"]["CUDA_VISIBLE_DEVICES"] for name in names] == ["0", "1", "2"]
    assert all(spec(name)["argv"][0] == sys.executable for name in names)
    cpus = install_kernels(tmp_path, gpus=[], threads=1)
    assert len(cpus) >= 1 and {spec(name)["env"]["OMP_NUM_THREADS"] for name in cpus} == {"1"}


# Grids


def test_a_grid_runs_skips_and_reports(notebook, tmp_path):
    rows = [{"b": 1.25}, {"b": 2}, {"b": 2.5, "fails": "purpose"}, {"b": 3, "fails": "late"}, {"b": 4, "fails": "dies"}, {"b": 5}]
    out = tmp_path / "runs" / "small"
    table = run_grid(notebook, rows, out, kernels=[KERNEL] * 2, progress=False)
    assert table.status.tolist() == ["done", "done", "failed", "failed", "failed", "done"]
    assert table.error[2].startswith("ValueError: last line of purpose") and "notebook.ipynb" in table.error[2]
    assert "died" in table.error[4].lower() and "ended with code 3" in table.error[4]
    complete = metrics_of(out)
    assert sorted(one["square"] for one in complete.values()) == [1.5625, 4, 25]
    assert {one["threads"] for one in complete.values()} == {"1"}
    failed = tmp_path / "runs" / table.run[2]
    assert "last line of purpose" in (failed / "notebook.ipynb").read_text() and "last line" in json.loads((failed / "failure.json").read_text())["error"]
    run = tmp_path / "runs" / table.run[0]
    assert json.loads((run / "params.json").read_text())["b"] == 1.25
    assert {file.name for file in run.iterdir() if not file.name.startswith(".")} == {"metrics.json", "notebook.ipynb", "params.json", "pid", "scores.txt"}
    times = {file: file.stat().st_mtime_ns for file in out.glob("*/metrics.json")}
    again = run_grid(notebook, rows[:2], out, kernels=[KERNEL], progress=False)
    assert again.status.tolist() == ["skipped"] * 2 and times == {file: file.stat().st_mtime_ns for file in out.glob("*/metrics.json")}


def test_what_failed_is_left_alone_unless_it_is_asked_for(notebook, tmp_path):
    first, out = [{"b": 2, "fails": "purpose"}], tmp_path / "runs" / "small"
    rows = [*first, {"b": 3}]
    assert run_grid(notebook, first, out, kernels=[KERNEL], progress=False).status.tolist() == ["failed"]
    when = read_failure(out / plan_jobs(notebook, first, out)[0].run_dir.name)["time"]
    left = run_grid(notebook, rows, out, kernels=[KERNEL], progress=False, retry_failed=False)
    assert left.status.tolist() == ["failed", "done"] and left.error[0].startswith("failed before and was left alone: ValueError: last line of purpose")
    assert read_failure(out.parent / left.run[0])["time"] == when
    assert run_grid(notebook, rows, out, kernels=[KERNEL], progress=False).status.tolist() == ["failed", "skipped"]
    assert read_failure(out.parent / left.run[0])["time"] > when


def test_a_run_over_its_time_is_ended_with_its_kernel(notebook, tmp_path):
    out = tmp_path / "runs" / "small"
    table = run_grid(notebook, [{"b": 1, "seconds": 600.0}], out, kernels=[KERNEL], progress=False, time_limit=12)
    late = out.parent / table.run[0]
    assert table.status.tolist() == ["failed"] and "ended after 12 s, its time limit" in table.error[0] and table.error[0] == read_failure(late)["error"]
    assert not is_complete(late) and not (late / "lock").exists()
    if (late / "pid").exists():  # a slow machine's kernel may not have come so far
        assert not psutil.pid_exists(int((late / "pid").read_text()))


def test_the_notebook_can_be_opened_at_any_time_while_it_runs(notebook, tmp_path):
    job, = plan_jobs(notebook, [{"b": 2, "seconds": 2.0}], tmp_path / "out")
    grid = subprocess.Popen([sys.executable, "-c", GRID, str(notebook), str(tmp_path / "out"), "", "2", "wait"], stdout=subprocess.PIPE)
    executed, seen = job.run_dir.parent, set()
    while grid.poll() is None:
        for file in executed.glob("*/notebook.ipynb"):
            cells = json.loads(file.read_text())["cells"]  # whole, whenever one looks
            seen.add(sum(cell.get("execution_count") is not None for cell in cells))
    assert grid.wait() == 0 and {1, max(seen)} <= seen and max(seen) >= 4, seen


def test_runs_wait_for_what_they_need_and_are_not_started_without_it(notebook, tmp_path):
    good, = plan_jobs(notebook, [{"b": 2}], tmp_path / "first")
    bad, = plan_jobs(notebook, [{"b": 3, "fails": "purpose"}], tmp_path / "first")
    on_good, = plan_jobs(notebook, [{"b": 4}], tmp_path / "second", after=[good.run_dir])
    on_bad, = plan_jobs(notebook, [{"b": 5}], tmp_path / "second", after=[bad.run_dir])
    table = run_jobs([on_bad, on_good, bad, good], kernels=[KERNEL] * 2, progress=False)
    assert table.status.tolist() == ["failed", "done", "failed", "done"]
    assert "not started" in table.error[0] and str(bad.run_dir) in table.error[0] and not on_bad.run_dir.exists()
    assert (good.run_dir / "metrics.json").stat().st_mtime <= (on_good.run_dir / "pid").stat().st_mtime


def test_a_run_somebody_is_writing_is_left_alone_and_named(notebook, tmp_path):
    job, = plan_jobs(notebook, [{"b": 2}], tmp_path / "out")
    lock = lock_run(job.run_dir)
    table = run_grid(notebook, [{"b": 2}], tmp_path / "out", kernels=[KERNEL], progress=False)
    assert table.status.tolist() == ["busy"] and f"process {os.getpid()}" in table.error[0] and "Wait until it is done" in table.error[0]
    assert not (job.run_dir / "params.json").exists()
    unlock_run(lock)


def test_any_executor_of_processes_will_do_but_no_threads(notebook, tmp_path):
    with ProcessPoolExecutor(1) as pool:
        assert run_grid(notebook, [{"b": 2}], tmp_path / "out", kernels=[KERNEL], executor=pool, progress=False).status.tolist() == ["done"]
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="not safe in threads"):
        run_grid(notebook, [{"b": 2}], tmp_path / "out", kernels=[KERNEL], executor=pool)


# Several at once, and killed ones


GRID = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
from bcos_nb.batch import run_grid
notebook, out, log, seconds, wait = sys.argv[1:]
rows = [{"b": b, "seconds": float(seconds), "log": log} for b in (1.0, 1.25, 2.0, 2.5)]
table = run_grid(notebook, rows, out, kernels=[%r] * 2, wait_for_others=wait == "wait")
print(",".join(table.status))
""" % KERNEL


def start_grid(notebook, out, log, seconds, wait="wait"):
    return subprocess.Popen([sys.executable, "-c", GRID, str(notebook), str(out), str(log), str(seconds), wait], stdout=subprocess.PIPE, text=True)


def test_two_grids_on_one_folder_share_the_work(notebook, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    grids = [start_grid(notebook, out, log, 0.3) for _ in range(2)]
    statuses = [grid.communicate(timeout=60)[0].strip().splitlines()[-1].split(",") for grid in grids]
    assert sorted(log.read_text().split()) == ["1.0", "1.25", "2.0", "2.5"], "each run was done once"
    assert sorted(status for pair in zip(*statuses) for status in pair) == ["done"] * 4 + ["skipped"] * 4
    assert len(metrics_of(out)) == 4 and not list(out.glob("*/lock"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_grid_that_is_ended_leaves_no_kernels_and_is_finished_by_the_next(notebook, tmp_path, how):
    out, log = tmp_path / "out", tmp_path / "log"
    grid = start_grid(notebook, out, log, 3)
    wait_until(lambda: metrics_of(out))  # some run has been through
    kernels = wait_until(lambda: [int(file.read_text()) for file in out.glob("*/pid") if file.stat().st_size and not is_complete(file.parent)])
    family = psutil.Process(grid.pid).children(recursive=True)
    before = metrics_of(out)
    grid.send_signal(how)
    grid.communicate(timeout=20)
    assert grid.returncode != 0
    gone, alive = psutil.wait_procs(family, timeout=10)
    assert not alive and not any(psutil.pid_exists(pid) for pid in kernels)
    assert not list(out.glob("*/failure.json")), "what is cut off has not failed"
    assert 0 < len(before) < 4 and all(metrics_of(out)[name] == content for name, content in before.items())
    for folder in out.iterdir():
        assert is_complete(folder) or not (folder / "metrics.json").exists()
    rest = start_grid(notebook, out, log, 3, wait="report")
    assert set(rest.communicate(timeout=60)[0].strip().splitlines()[-1].split(",")) <= {"done", "skipped"}
    assert sorted(one["square"] for one in metrics_of(out).values()) == [1, 1.5625, 4, 6.25] and not list(out.glob("*/lock"))


def test_a_killed_worker_fails_its_run_only(notebook, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    grid = start_grid(notebook, out, log, 1.5)
    pid = wait_until(lambda: [int(file.read_text()) for file in out.glob("*/pid") if file.stat().st_size])[0]
    psutil.Process(pid).parent().kill()  # the worker of this kernel
    statuses = grid.communicate(timeout=60)[0].strip().splitlines()[-1].split(",")
    assert sorted(statuses) == ["done"] * 3 + ["failed"]
    reason = next(iter(out.glob("*/failure.json"))).read_text()
    assert "killed by signal 9" in reason and not list(out.glob("*/lock")) and not psutil.pid_exists(pid)
