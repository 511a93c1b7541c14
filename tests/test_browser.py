"""The threshold explorer in a real browser: JupyterLab is started, the notebook is run, the slider is moved."""
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
from pathlib import Path

import pytest
import torch

from bcos_nb.data import forge_dataset, load_frames, read_catalog
from bcos_nb.explainers import explain
from bcos_nb.games import localization_scores
from bcos_nb.models import create_detector, load_detector, save_detector
from bcos_nb.resources import resource_path

pytestmark = pytest.mark.browser
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
SCREENSHOTS = Path(__file__).resolve().parents[1] / "test-output"


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: `apt-get install chromium` to run the browser test")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright's Python client is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder as a visitor has it: the exploring notebook, and a run with two small untrained detectors."""
    root = tmp_path_factory.mktemp("lab")
    shutil.copy(resource_path("nbs/explore/thresholds.ipynb"), root)
    forge_dataset(root / "data", identities=6, frames_per_video=1, size=64, compressions=("c23",), progress=False)
    for b in (None, 2.0):
        torch.manual_seed(0)
        run = root / "runs" / "demo" / "train" / f"resnet10-{b}"
        run.mkdir(parents=True)
        save_detector(create_detector("resnet10", b=b, width=0.25), run / "detector.safetensors")
        (run / "params.json").write_text(json.dumps({"arch": "resnet10", "b": b, "data": "data", "compression": "c23", "image_size": 64}))
        (run / "metrics.json").write_text("{}")
    return root


@pytest.fixture(scope="module")
def lab(folder, chromium):
    """The address of a JupyterLab on a free port, with a token."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    settings = {name: str(folder / f".{name.lower()}") for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "IPYTHONDIR")}
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
        for _ in range(300):
            assert server.poll() is None, (folder / "lab.log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=2)
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        yield f"{address}/lab/tree/thresholds.ipynb?token={token}"
    finally:
        server.terminate()
        server.wait(20)


def expected_scores(folder: Path, b: float | None, explainer: str, frame: int, threshold: float) -> tuple[str, str]:
    """What localization_scores says of one fake, with four decimals."""
    detector = load_detector(folder / "runs" / "demo" / "train" / f"resnet10-{b}" / "detector.safetensors")
    catalog = read_catalog(folder / "data", "FaceForensics++", "test", "c23")
    fakes = load_frames(catalog[catalog.label == 1].reset_index(drop=True), 64, root=folder / "data")
    maps = explain(detector, fakes.images[[frame]].float() / 255, explainer).maps
    scores = localization_scores(maps, fakes.masks[[frame], 0] == 255, (threshold,))
    return tuple(f"{scores[name].item():.4f}" for name in ("weighted", "unweighted"))


def test_threshold_explorer(lab, folder, chromium):
    errors = []
    SCREENSHOTS.mkdir(exist_ok=True)
    page = chromium.new_page(viewport={"width": 1280, "height": 1000})
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.set_default_timeout(45_000)
    page.goto(lab)
    page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # whoever runs cells earlier is asked for a kernel
    page.keyboard.press("Control+b")  # the file browser aside, as a visitor would have it
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()

    handle = page.locator(".bcos-threshold .noUi-handle")
    handle.wait_for(timeout=120_000)  # the explorer explains before it shows
    weighted, unweighted = page.locator("b.bcos-weighted"), page.locator("b.bcos-unweighted")
    weighted.wait_for()
    page.locator(".bcos-explorer .js-plotly-plot .scatterlayer").wait_for()
    # Both detectors can be chosen; the first is the ordinary one with Grad-CAM on the first fake, at threshold 0.5.
    shown = lambda: (weighted.inner_text(), unweighted.inner_text())
    assert shown() == expected_scores(folder, None, "gradcam", 0, 0.5)

    picture = lambda: page.locator(".bcos-explorer img").nth(2).get_attribute("src")
    before, blob = shown(), picture()
    handle.focus()
    for _ in range(3):
        handle.press("ArrowRight")
    page.wait_for_function("text => document.querySelector('b.bcos-unweighted').innerText != text", arg=before[1])
    page.wait_for_function("() => document.querySelector('.bcos-threshold .widget-readout').innerText == '0.53'")
    wanted = expected_scores(folder, None, "gradcam", 0, 0.53)
    page.wait_for_function("text => document.querySelector('b.bcos-weighted').innerText == text", arg=wanted[0])
    assert shown() == wanted and picture() != blob

    page.locator(".bcos-explorer select").first.select_option("ResNet-10, B = 2")
    wanted = expected_scores(folder, 2.0, "gradcam", 0, 0.53)  # the explainer stays; its menu is filled anew
    page.wait_for_function("text => document.querySelector('b.bcos-weighted').innerText == text", arg=wanted[0])
    page.locator(".bcos-explorer select").nth(1).select_option("B-cos")
    wanted = expected_scores(folder, 2.0, "bcos", 0, 0.53)
    page.wait_for_function("text => document.querySelector('b.bcos-weighted').innerText == text", arg=wanted[0])
    page.locator(".bcos-explorer button").nth(1).click()  # the next frame
    wanted = expected_scores(folder, 2.0, "bcos", 1, 0.53)
    page.wait_for_function("text => document.querySelector('b.bcos-weighted').innerText == text", arg=wanted[0])
    assert re.search(r"Frame 2 of \d+", page.locator(".bcos-verdict").inner_text())

    page.locator(".bcos-explorer").scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    page.screenshot(path=SCREENSHOTS / "thresholds.png")
    assert not errors, errors
