"""Everything that `make test` looks at: package in step with notebooks, notebooks clean, all execute, pytest.

    python tests/check.py            the four checks
    python tests/check.py --slow     with the tests that take minutes
    python tests/check.py --refresh  execute the library notebooks in place instead, so that their outputs are current
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NOT_LIBRARY = ("experiments", "explore")  # run by papermill and by people, not exported
LARGEST = 500_000  # bytes of a notebook
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def library_notebooks():
    found = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
    return [path for path in found if path.relative_to(ROOT / "nbs").parts[0] not in NOT_LIBRARY]


def contents(folder, pattern):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob(pattern)) if ".ipynb_checkpoints" not in path.parts}


def copy_of_tree(place):
    """The notebooks and the package as they lie here, uncommitted changes included, where tools may write."""
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md"):
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, place / name)
    for name in ("nbs", "bcos_nb"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    return place


def run_tool(tool, place):
    done = subprocess.run([BIN / tool], cwd=place, capture_output=True, text=True)
    return [f"{tool} ended with code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"] if done.returncode else []


def package_in_step():
    """Faults of the exported package: what nbdev_export would change, and modules whose notebook is gone."""
    with tempfile.TemporaryDirectory() as place:
        place = copy_of_tree(Path(place))
        before = contents(place / "bcos_nb", "*.py")
        faults = run_tool("nbdev_export", place)
        after = contents(place / "bcos_nb", "*.py")
    source = re.compile(rb"File to edit: (?:\.\./)*(nbs/\S+\.ipynb)")
    for path in sorted(set(before) | set(after)):
        notebook = source.search(before.get(path, b"")) or source.search(after.get(path, b""))
        if before.get(path) != after.get(path):
            origin = notebook[1].decode() if notebook else "the notebooks"
            faults.append(f"bcos_nb/{path} is out of step with {origin}: edit the notebook, then `make export`")
        elif notebook and not (ROOT / notebook[1].decode()).exists():
            faults.append(f"bcos_nb/{path} comes from {notebook[1].decode()}, which is gone: delete the module")
    return faults


def notebooks_clean():
    """Notebooks that nbdev_clean would change, or that are too large."""
    with tempfile.TemporaryDirectory() as place:
        place = copy_of_tree(Path(place))
        before = contents(place / "nbs", "*.ipynb")
        faults = run_tool("nbdev_clean", place)
        after = contents(place / "nbs", "*.ipynb")
    for path, content in before.items():
        if after[path] != content:
            faults.append(f"nbs/{path} is not clean: `make export`")
        if len(content) > LARGEST:
            faults.append(f"nbs/{path} has {len(content) // 1000} kB, more than {LARGEST // 1000}: make its outputs smaller")
    return faults


def notebooks_execute():
    """Library notebooks that do not run from top to bottom."""
    skip = "^([_.]|" + "|".join(f"{name}$" for name in NOT_LIBRARY) + ")"
    done = subprocess.run(
        [BIN / "nbdev_test", "--n_workers", str(min(cores(), 8)), "--skip_folder_re", skip, "--timing"],
        cwd=ROOT, env=os.environ | ONE_THREAD, capture_output=True, text=True,
    )
    if done.returncode == 0:
        return []
    print(done.stdout[-4000:], done.stderr[-20000:], sep="\n", flush=True)
    named = re.findall(r"Error in (\S+\.ipynb)", done.stderr) or re.findall(r"^\t(\S+\.ipynb)", done.stderr, re.M)
    return [f"{os.path.relpath(name, ROOT) if os.path.isabs(name) else name} does not execute (its error is above)" for name in dict.fromkeys(named)] or [
        f"nbdev_test ended with code {done.returncode}"
    ]


def pytest_passes(slow):
    """Runs pytest, its output shown as it comes; gives its faults and its last line."""
    command = [sys.executable, "-m", "pytest", "tests", "-n", str(min(cores(), 8)), "--dist", "loadfile", "--durations=5", "-m", "" if slow else "not slow"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | ONE_THREAD | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.strip())
    code = process.wait()
    last = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|errors?|skipped).* in [\d.]+s", line)), "pytest said nothing")
    return ([f"pytest: {last.strip('= ')}"] if code else []), last


def refresh():
    """Executes the library notebooks in place, several at once, and cleans them."""
    waiting, running, faults = library_notebooks(), {}, []
    total = len(waiting)
    while waiting or running:
        while waiting and len(running) < min(cores(), 8):
            path = waiting.pop(0)
            command = [BIN / "jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace", "--log-level=ERROR",
                       "--ExecutePreprocessor.store_widget_state=False", path.name]
            running[path] = subprocess.Popen(command, cwd=path.parent, env=os.environ | ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for path, process in list(running.items()):
            try:
                _, error = process.communicate(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
            del running[path]
            print(f"{total - len(waiting) - len(running)} of {total}  {path.relative_to(ROOT)}", "failed" if process.returncode else "executed", flush=True)
            if process.returncode:
                faults.append(f"{path.relative_to(ROOT)}: {(error.strip().splitlines() or ['no message'])[-1]}")
    subprocess.run([BIN / "nbdev_clean"], cwd=ROOT, check=True)
    for path in library_notebooks():  # what a notebook prints of this machine's folders helps nobody
        path.write_text(path.read_text(encoding="utf-8").replace(str(ROOT), "~/bcos_nb"), encoding="utf-8")
    return faults


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", action="store_true", help="also the tests that take minutes")
    parser.add_argument("--refresh", action="store_true", help="execute the library notebooks in place")
    chosen = parser.parse_args()
    if chosen.refresh:
        faults = refresh()
        print("\n".join(faults) or "All library notebooks are current.")
        return bool(faults)
    begin, summary, failed, last = time.monotonic(), [], False, ""
    steps = [
        ("package in step with the notebooks", package_in_step),
        ("notebooks clean", notebooks_clean),
        (f"library notebooks execute ({len(library_notebooks())})", notebooks_execute),
        ("pytest", lambda: pytest_passes(chosen.slow)),
    ]
    for name, step in steps:
        print(f"{name} ...", flush=True)
        since = time.monotonic()
        faults = step()
        if name == "pytest":
            faults, last = faults
        failed = failed or bool(faults)
        summary.append(f"{'FAILED' if faults else 'ok':<7} {name}, {time.monotonic() - since:.0f} s")
        summary += [f"        {fault}" for fault in faults]
    print(f"\nmake test, {time.monotonic() - begin:.0f} s:", *summary, last, sep="\n", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
