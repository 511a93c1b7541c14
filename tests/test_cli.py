"""The command line: what it says, what it refuses, and that a demo does what is missing and nothing else."""
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from typer.testing import CliRunner

from bcos_nb import cli
from bcos_nb.batch import install_kernels, presets
from bcos_nb.batch.runs import finish_run, lock_run, report_progress, unlock_run, write_json

PROGRAM = [sys.executable, "-c", "from bcos_nb.cli import main; main()"]

TINY = """
name: tiny
data: {root: %s, dataset: FaceForensics++, image_size: 64, frames_per_video: 2, forge: {identities: 14, frames_per_video: 2, size: 64, seed: 0}}
detectors: {arch: resnet10, b: [null, 2], options: {width: 0.25}}
training: {compression: c23, epochs: 1, batch_size: 16, lr: 1.0e-3, ordinary: {lr: 2.0e-3}}
evaluation: {compressions: [c23]}
games: {explainers: [bcos, gradcam], compression: c23, grids: 2}
"""


def program(*arguments, **options):
    return subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=60, **options)


def test_help_is_quick_and_needs_no_torch():
    begin = time.monotonic()
    shown = program("--help")
    assert time.monotonic() - begin < 5 and shown.returncode == 0
    assert all(command in shown.stdout for command in ("forge", "run", "report", "lab", "demo"))
    heavy = "import sys, bcos_nb.cli, bcos_nb.batch.presets; print([name for name in ('torch', 'pandas', 'papermill', 'plotly') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("arguments, said", [
    (["run", "dmo"], ["no preset 'dmo'", "demo"]),
    (["run", "nowhere.yaml"], ["nowhere.yaml does not exist"]),
    (["run", "wrong.yaml"], ["wrong.yaml", "epocs", "unknown section"]),
    (["run", "torn.yaml"], ["torn.yaml is not YAML"]),
    (["run", "grid.yaml"], ["no parameter 'B'", "grid"]),
    (["run", "hollow.yaml"], ["its grid has no rows"]),
    (["run", "spared.yaml"], ["exclude", "fits no run", "b: 1, 2"]),
    (["run", "demo", "--only", "resnet99"], ["resnet99 names no run", "resnet10", "mask_game"]),
    (["run", "demo", "--time-limit", "30"], ["30 is no duration", "30m"]),
    (["status", "no/such"], ["no folder of runs at no/such"]),
    (["demo", "--preset", "no_data.yaml"], ["some/where does not exist", "--data"]),
    (["report", "empty"], ["empty"]),
])
def test_a_mistake_is_answered_with_one_paragraph(tmp_path, arguments, said):
    (tmp_path / "wrong.yaml").write_text("data: {root: x}\ndetectors: {arch: resnet10}\nepocs: 3\n")
    (tmp_path / "torn.yaml").write_text("data: {root: [\n")
    (tmp_path / "grid.yaml").write_text("notebook: train\ngrid: {B: [1, 2]}\n")
    (tmp_path / "hollow.yaml").write_text("notebook: train\ngrid: {b: []}\n")
    (tmp_path / "spared.yaml").write_text("notebook: train\ngrid: {b: [1, 2]}\nexclude: [{b: 3}]\n")
    (tmp_path / "no_data.yaml").write_text("data: {root: some/where}\ndetectors: {arch: resnet10}\n")
    (tmp_path / "empty").mkdir()
    answer = program(*arguments, cwd=tmp_path)
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    paragraph = answer.stderr.strip().splitlines()[-1]
    assert all(part in paragraph for part in said), answer.stderr
    assert not (tmp_path / "runs").exists()


def test_debug_shows_where_an_error_comes_from():
    assert "Traceback" in program("run", "dmo", "--debug").stderr


def test_a_preset_makes_its_runs_and_passes_what_differs(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY % "data/tiny")
    jobs = presets.preset_jobs(presets.load_preset(path), tmp_path / "runs", "/elsewhere")
    assert [job.run_dir.parent.name for job in jobs] == ["train", "train"] + ["mask_game", "grid_game", "detect"] * 2
    rate = {job.params["b"]: job.params["training"]["lr"] for job in jobs[:2]}
    assert rate == {2: 1e-3, None: 2e-3} and all("ordinary" not in job.params["training"] for job in jobs[:2])
    assert {job.params["data"] for job in jobs} == {"/elsewhere"} and jobs[0].params["width"] == 0.25
    dry = program("run", path, "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0 and sum(line.startswith("to do") for line in dry.stdout.splitlines()) == 8 and "8 runs: 8 to do" in dry.stdout and not (tmp_path / "runs").exists()


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """A preset whose experiments are notebooks without torch, and a forge and a report that only leave a trace."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    defaults = {experiment: cell_of(presets.notebook_of(experiment)) for experiment in ("train", "mask_game", "grid_game", "detect")}
    for experiment, parameters in defaults.items():
        cells = [parameters, "import os\nif os.path.exists('broken') and b == 2:\n    raise ValueError('broken on purpose')\n"
                 "from bcos_nb.batch.runs import finish_run\nfinish_run(run_dir, {'b': b})"]
        content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        content.cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(content, folder / f"{experiment}.ipynb")
    calls = []

    def forge_here(root, recipe):
        calls.append("forge")
        Path(root).mkdir(parents=True, exist_ok=True)

    def write_report(runs):
        calls.append("report")
        page = Path(runs) / "report" / "report.html"
        page.parent.mkdir(exist_ok=True)
        page.write_text("report")

    monkeypatch.setattr(presets, "notebook_of", lambda experiment: folder / f"{experiment}.ipynb")
    monkeypatch.setattr(cli, "forge_here", forge_here)
    monkeypatch.setitem(sys.modules, "bcos_nb.reports", types.SimpleNamespace(write_report=write_report))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY % "data/tiny")
    install_kernels()
    return calls


def cell_of(notebook):
    cells = json.loads(Path(notebook).read_text())["cells"]
    return next("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", []))


def demo():
    answer = CliRunner().invoke(cli.app, ["demo", "--preset", "tiny.yaml", "--out", "runs/tiny"])
    return answer.exit_code, answer.output


def test_a_demo_does_what_is_missing_and_nothing_else(stubs, tmp_path):
    (tmp_path / "broken").touch()
    code, said = demo()
    complete = sorted((tmp_path / "runs/tiny").glob("*/*/metrics.json"))
    assert code == 1 and "4 of 8 runs" in said and "broken on purpose" in said and "3 more were not started" in said
    assert len(complete) == 4 and stubs == ["forge"]

    (tmp_path / "broken").unlink()
    times = {file: file.stat().st_mtime_ns for file in complete}
    code, said = demo()
    assert code == 0 and "4 are complete already" in said and str(tmp_path / "runs/tiny/report/report.html") in said
    assert len(list((tmp_path / "runs/tiny").glob("*/*/metrics.json"))) == 8 and stubs == ["forge", "forge", "report"]
    assert times == {file: file.stat().st_mtime_ns for file in complete}

    every = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    code, said = demo()
    assert code == 0 and "Everything is already there" in said and len(said.strip().splitlines()) == 1
    assert every == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} and len(stubs) == 3

    (tmp_path / "runs/tiny/report/report.html").unlink()
    assert demo()[0] == 0 and stubs[3:] == ["forge", "report"]


def test_a_grid_file_runs_a_notebook_of_yours(stubs, tmp_path):
    (tmp_path / "grid.yaml").write_text("notebook: notebooks/detect.ipynb\ngrid: {b: [1.25, 3]}\nout: somewhere\n")
    answer = CliRunner().invoke(cli.app, ["run", "grid.yaml"])
    assert answer.exit_code == 0 and "All 2 runs in somewhere are complete, 2 of them done now" in answer.output
    assert len(list((tmp_path / "somewhere").glob("*/metrics.json"))) == 2


def test_a_part_of_a_grid_its_state_and_what_failed(stubs, tmp_path):
    def said(*arguments):
        answer = CliRunner().invoke(cli.app, list(map(str, arguments)))
        return answer.exit_code, " ".join(answer.output.split())

    (tmp_path / "broken").touch()
    code, text = said("run", "tiny.yaml", "--out", "runs/tiny", "--only", "detect", "--only", "2,ordinary")
    assert code == 1 and "2 of 4 runs" in text and "broken on purpose" in text and "--retry-failed" in text
    (tmp_path / "broken").unlink()
    code, text = said("run", "tiny.yaml", "--out", "runs/tiny", "--only", "detect")
    assert code == 1 and "failed before and was left alone: ValueError: broken on purpose" in text and "Nothing failed now" in text

    code, text = said("status", "runs/tiny")
    assert code == 0 and text.startswith("4 runs: 2 done, 1 failed, 1 to do; about") and "broken on purpose" in text
    code, text = said("run", "tiny.yaml", "--out", "runs/tiny", "--dry-run")
    assert code == 0 and "8 runs: 2 done, 1 failed, 5 to do; about" in text and "without an estimate" not in text and "Nothing was started" in text

    code, text = said("run", "tiny.yaml", "--out", "runs/tiny", "--only", "detect", "--retry-failed", "--time-limit", "10m")
    assert code == 0 and "All 4 runs" in text and "2 of them done now" in text
    assert said("status", "runs/tiny")[1].startswith("4 runs: 4 done ")


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_the_state_is_refreshed_in_place_on_a_terminal_until_nothing_runs(tmp_path):
    import pty

    run = tmp_path / "runs" / "train" / "one"
    run.mkdir(parents=True)
    write_json(run / "params.json", {"b": 2})
    (run / "notebook.ipynb").write_text("{}")
    lock = lock_run(run)
    report_progress(run, "epoch 1/2", 0.25)
    ours, theirs = pty.openpty()
    said = b""

    def read_until(words):
        nonlocal said
        while words not in said:
            said += os.read(ours, 4096)

    with subprocess.Popen([*PROGRAM, "status", str(tmp_path / "runs")], stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm", "COLUMNS": "120"}) as process:
        os.close(theirs)
        try:
            read_until(b"epoch 1/2")
            report_progress(run, "epoch 2/2", 0.75)
            read_until(b"epoch 2/2")
            finish_run(run, {"val_auc": 0.9})
            unlock_run(lock)
            read_until(b"runs: 1 done")
            assert process.wait(30) == 0  # by itself: nothing runs any more
        except OSError:  # it has ended, and nobody is at the terminal's other end
            pytest.fail(said.decode())
        finally:
            process.kill()
            os.close(ours)
    first, second, last = (said.index(words) for words in (b"epoch 1/2", b"epoch 2/2", b"runs: 1 done"))
    assert first < second < last and b"\x1b[1A\x1b[2K" in said[first:second]  # a line up, and cleared


def test_a_reason_that_several_runs_share_is_told_once(capsys, tmp_path):
    rows = [("detect/a", "ValueError: no disk (see runs/a.ipynb)"), ("detect/b", "ValueError: no disk (see runs/b.ipynb)"), ("train/c", "OSError: other (see runs/c.ipynb)"),
            ("detect/d", "ValueError: no disk (see runs/d.ipynb)"), ("detect/c", "not started: train/c failed")]
    table = pd.DataFrame([dict(run=run, status="failed", error=error) for run, error in rows] + [dict(run="train/e", status="done", error="")])
    with pytest.raises(RuntimeError, match="5 of 6 runs in .* are not complete. 1 more were not started.*--retry-failed"):
        cli.report_failures(table, tmp_path)
    text = " ".join(capsys.readouterr().err.split())
    assert text == "detect/a, detect/b and 1 more: ValueError: no disk (see runs/a.ipynb) train/c: OSError: other (see runs/c.ipynb)"


def test_a_detector_trained_elsewhere_becomes_a_run(tmp_path, monkeypatch):
    import torch
    import yaml
    from bcos_nb.batch.runs import find_training
    from bcos_nb.models import create_detector, load_detector

    monkeypatch.chdir(tmp_path)
    theirs = create_detector("resnet10", width=0.25)
    torch.save({f"module.{name}": value for name, value in theirs.state_dict().items()}, tmp_path / "ckpt_best.pth")

    def said(*arguments):
        answer = CliRunner().invoke(cli.app, ["adopt", "ckpt_best.pth", "runs/theirs", *arguments])
        return answer.exit_code, " ".join(answer.output.split())

    code, text = said("--arch", "resnet10")
    assert code == 1 and "does not fit" in text and not (tmp_path / "runs").exists()
    code, text = said("--arch", "resnet10", "--option", "width=0.25", "--image-size", "64", "--compression", "none", "--dataset", "DFDC")
    assert code == 0 and "bcos-nb run runs/theirs/ckpt_best-detect.yaml" in text
    folder = find_training("runs/theirs/train/ckpt_best", None)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(load_detector(folder).eval()(images), theirs.eval()(images))
    for experiment, key in (("detect", "compressions"), ("mask_game", "compression"), ("grid_game", "compression")):
        grid = yaml.safe_load((tmp_path / f"runs/theirs/ckpt_best-{experiment}.yaml").read_text())
        jobs, out = cli.read_jobs(f"runs/theirs/ckpt_best-{experiment}.yaml", None, None)
        assert grid["notebook"] == experiment and out == Path(f"runs/theirs/{experiment}") and len(jobs) == 1
        assert jobs[0].params["detector"] == str(folder) and jobs[0].params["image_size"] == 64 and jobs[0].params[key] == ([None] if experiment == "detect" else None)
    assert said("--arch", "resnet10", "--option", "width=0.25")[0] == 1


@pytest.mark.parametrize("text, seconds", [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("2d", 172800), ("1:30:00", 5400), ("2:30", 150)])
def test_durations_as_people_write_them(text, seconds):
    assert cli.parse_duration(text) == seconds


def test_lab_copies_an_installed_packages_notebooks_and_keeps_what_is_there(tmp_path, monkeypatch):
    installed = tmp_path / "site-packages/bcos_nb/_resources/nbs/explore"
    installed.mkdir(parents=True)
    for name in ("thresholds", "grids"):
        (installed / f"{name}.ipynb").write_text(name)
    monkeypatch.setattr(cli, "resource_path", lambda relative: installed)
    here = tmp_path / "here"
    (here / "explore").mkdir(parents=True)
    (here / "explore" / "grids.ipynb").write_text("somebody's work")
    assert cli.explore_folder(here) == (here / "explore", here)
    assert {file.name: file.read_text() for file in (here / "explore").iterdir()} == {"thresholds.ipynb": "thresholds", "grids.ipynb": "somebody's work"}


@pytest.mark.slow
def test_a_real_demo_that_was_killed_is_finished_by_the_next(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY % (tmp_path / "data"))
    arguments = ["demo", "--preset", tmp_path / "tiny.yaml", "--out", tmp_path / "runs"]
    first = subprocess.Popen([*PROGRAM, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while not list((tmp_path / "runs").glob("train/*/metrics.json")):
        assert time.monotonic() < end and first.poll() is None
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").glob("*/*/metrics.json")}
    second = subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=600)
    # One epoch on a handful of faces makes no detector that is sure of anything, so a grid game may find no grid.
    assert second.returncode == 0 or "cannot play the grid game" in second.stderr, second.stderr
    assert all(file.stat().st_mtime_ns == when for file, when in before.items())
    assert len(list((tmp_path / "runs").glob("train/*/metrics.json"))) == 2 and not list((tmp_path / "runs").glob("*/*/lock"))
