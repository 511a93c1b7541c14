"""What the browser tests share: a Chromium, a folder as a visitor has it, a JupyterLab on it, and a notebook run in it.

    from browser import demo, lab, open_notebook   # the first two are fixtures; chromium is one for all modules
"""
import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from bcos_nb.data import forge_dataset
from bcos_nb.resources import resource_path

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
SCREENSHOTS = Path(__file__).resolve().parents[1] / "test-output"
DETECTORS = {None: "ordinary", 2.0: "bcos"}  # b to the name in data/examples


@contextlib.contextmanager
def started_chromium():
    """A browser. Skips the test where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: `apt-get install chromium` to run the browser tests")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright's Python client is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def chromium():
    with started_chromium() as browser:
        yield browser


def fill_demo(
    root: Path,
    identities: int = 6,
    frames_per_video: int = 2,
) -> Path:
    """A folder as a visitor has it: the exploring notebooks, a small dataset, and a run with the package's two small detectors."""
    for notebook in resource_path("nbs/explore").glob("*.ipynb"):
        shutil.copy(notebook, root)
    forge_dataset(root / "data", identities=identities, frames_per_video=frames_per_video, size=128, compressions=("c23",), progress=False)
    for b, name in DETECTORS.items():
        run = root / "runs" / "demo" / "train" / f"resnet10-{name}"
        run.mkdir(parents=True)
        for ending in ("safetensors", "json"):
            shutil.copy(resource_path(f"data/examples/{name}.{ending}"), run / f"detector.{ending}")
        parameters = {"arch": "resnet10", "b": b, "data": "data", "compression": "c23", "image_size": 128, "frames_per_video": frames_per_video}
        (run / "params.json").write_text(json.dumps(parameters))
        (run / "metrics.json").write_text("{}")
    return root


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    return fill_demo(tmp_path_factory.mktemp("lab"))


@dataclass
class Lab:
    """A JupyterLab that runs."""

    address: str
    token: str
    folder: Path

    def notebook(self, name: str) -> str:
        """Address of a notebook, in a workspace of its own."""
        return f"{self.address}/lab/workspaces/{secrets.token_hex(4)}/tree/{name}?token={self.token}"


@contextlib.contextmanager
def started_lab(folder: Path):
    """A JupyterLab on a free port, with a token, that knows no settings but its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    settings = {name: str(folder / f".{name.lower()}") for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
                                                                    "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
    news = Path(settings["JUPYTERLAB_SETTINGS_DIR"]) / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True, exist_ok=True)
    news.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"]
    command += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    environment = {key: value for key, value in os.environ.items() if key != "BCOS_NB_RUNS"} | settings | {"OMP_NUM_THREADS": "1"}
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, (folder / "lab.log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=2)
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        yield Lab(address, token, folder)
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="session")
def lab(demo, chromium):
    with started_lab(demo) as server:
        yield server


@contextlib.contextmanager
def open_notebook(
    browser,
    server: Lab,
    name: str,  # of the notebook
    *,
    width: int = 1280,
    height: int = 1000,
):
    """A page on which all cells of a notebook run; `page.errors` must stay empty, and is held to at the end."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(f"{error} {(error.stack or str())[:900]}"))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.set_default_timeout(60_000)
    page.goto(server.notebook(name))
    page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # whoever runs cells earlier is asked for a kernel
    page.keyboard.press("Control+b")  # the file browser aside, as a visitor would have it
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.began = time.perf_counter()
    page.get_by_text("Run All Cells", exact=True).click()
    try:
        try:
            yield page
        except BaseException:
            SCREENSHOTS.mkdir(exist_ok=True)
            page.screenshot(path=SCREENSHOTS / f"{Path(name).stem}_failed.png")
            raise
        assert not page.errors, page.errors
        assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error'], .jp-RenderedText[data-mime-type*=error]").count() == 0
    finally:
        page.close()


def theme(page, name: str) -> None:
    """JupyterLab's theme by its name in the menu."""
    page.get_by_role("menuitem", name="Settings", exact=True).click()
    page.get_by_text("Theme", exact=True).hover()
    page.get_by_text(name, exact=True).click()
    page.locator(f'body[data-jp-theme-name="{name}"]').wait_for(state="attached")
    page.wait_for_timeout(300)


def shoot(page, name: str, selector: str = ".bcos-explorer") -> None:
    """A screenshot into test-output, with the instrument at the top."""
    SCREENSHOTS.mkdir(exist_ok=True)
    page.locator(selector).first.evaluate("element => element.scrollIntoView({block: 'start'})")
    page.wait_for_timeout(300)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def nameless(page, selector: str = ".bcos-explorer") -> list[str]:
    """The controls for which a screen reader has a role and no name."""
    page.wait_for_timeout(600)  # names that ipywidgets leaves out are given twice a second
    lines = page.locator(selector).first.aria_snapshot().splitlines()
    return [line for line in lines if re.match(r"\s*- (button|checkbox|combobox|slider|spinbutton|textbox|listbox|option|progressbar|link|img)(?! \")\b", line)]


STEP = """async (steps) => {
  const handle = document.querySelector(".bcos-threshold .noUi-handle"), taken = [];
  const last = [...document.querySelectorAll(".bcos-canvas:not(.bcos-plain) .bcos-picture")].at(-1);  // its label names the threshold, when it is painted
  handle.focus();
  for (let k = 0; k < steps; k++) {
    const begin = performance.now();
    const painted = new Promise((done) => new MutationObserver((_, self) => { self.disconnect(); const after = new MessageChannel(); after.port1.onmessage = done; after.port2.postMessage(0); })
      .observe(last, { attributes: true, attributeFilter: ["aria-label"] }));
    handle.dispatchEvent(new KeyboardEvent("keydown", { key: k % 60 < 30 ? "ArrowRight" : "ArrowLeft", bubbles: true, cancelable: true }));
    await painted;
    taken.push(performance.now() - begin);
    await new Promise((rest) => setTimeout(rest, 30));
  }
  return taken;
}"""


def slider_steps(page, steps: int = 90) -> list[float]:
    """Milliseconds of each of some steps of the threshold slider, from the key to the painted pictures and scores."""
    return page.evaluate(STEP, steps)
