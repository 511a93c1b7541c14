"""How fast the exploring instruments answer, measured in a real browser: what `tests/bench.py --only explore` prints.

    python tests/explore_bench.py    about two minutes on 2 cores; needs Chromium and playwright
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from browser import CHROMIUM, fill_demo, open_notebook, slider_steps, started_chromium, started_lab

# What is measured, and what is to be reached, in seconds; memory in megabytes.
REACH = {"slider step, 256 px, four maps: median": 0.033, "slider step, 256 px, four maps: 95 %": 0.060, "first picture after run all": 8.0,
         "next frame, five explainers": 0.5, "next frame, computed ahead": 0.05, "memory after 500 frames, MB": 300.0}
OPEN = """import torch
from bcos_nb.data import Frames
from bcos_nb.models import create_detector
from bcos_nb.widgets import ThresholdExplorer
import pandas as pd

def frames(count, side):
    torch.manual_seed(0)
    masks = torch.zeros(count, 1, side, side, dtype=torch.uint8)
    masks[:, :, side // 4:side // 2, side // 4:3 * side // 4] = 255
    names = [str(k) for k in range(count)]
    catalog = pd.DataFrame({"frame": names, "mask": "", "video": names, "label": 1, "method": "Deepfakes"})
    rough = torch.rand(count, 3, 16, 16)
    images = (torch.nn.functional.interpolate(rough, size=(side, side), mode="bilinear") * 255).byte()
    return Frames(images, masks, torch.ones(count, dtype=torch.long), names, catalog)

detectors = {"B = 2": create_detector("resnet10", b=2, width=0.5, stem="fine", energy_stem=True).eval()}  # the demo's, untrained
"""
FOUR = OPEN + 'ThresholdExplorer(detectors, frames(40, 256), ["bcos", "gradcam", "gradcam++", "layercam"], threshold=0.2, ahead=0, side=256)'
FIVE = OPEN + 'ThresholdExplorer(detectors, frames(200, 128), ["bcos", "gradcam", "gradcam++", "xgradcam", "layercam"], columns=5, threshold=0.2, ahead=AHEAD)'
NEXT = """async (count) => {  // milliseconds from the arrow key to the next frame's maps
  const canvas = [...document.querySelectorAll(".bcos-canvas")].at(-1), taken = [];
  canvas.focus();
  for (let k = 0; k < count; k++) {
    const begin = performance.now(), last = [...canvas.querySelectorAll(".bcos-picture")].at(-1);  // its label is written when it is painted
    const shown = new Promise((done) => new MutationObserver((_, self) => { self.disconnect(); const after = new MessageChannel(); after.port1.onmessage = done; after.port2.postMessage(0); })
      .observe(last, { attributes: true, attributeFilter: ["aria-label"] }));
    canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true, cancelable: true }));
    await shown;
    taken.push(performance.now() - begin);
    await new Promise((rest) => setTimeout(rest, 1500));
  }
  return taken;
}"""
MEMORY = OPEN + """
import gc, psutil
explorer = ThresholdExplorer(detectors, frames(520, 128), ["bcos", "gradcam", "gradcam++", "xgradcam", "layercam"], columns=5)
gc.collect()
start = psutil.Process().memory_info().rss
for _ in range(500):
    explorer.chooser.step(1)
assert explorer.message.value == "" and explorer.shown.row == 500
print((psutil.Process().memory_info().rss - start) / 2**20)
"""


def notebook(folder: Path, name: str, source: str) -> str:
    """A notebook of one cell."""
    cell = {"cell_type": "code", "execution_count": None, "id": "a", "metadata": {}, "outputs": [], "source": source}
    meta = {"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}}
    (folder / name).write_text(json.dumps({"cells": [cell], "metadata": meta, "nbformat": 4, "nbformat_minor": 5}))
    return name


def explore_times():
    """Pairs of a name of `REACH` and what was measured, as soon as it is. RuntimeError where there is no browser."""
    if CHROMIUM is None:
        raise RuntimeError("There is no Chromium on this machine, so nothing can be measured in it: `apt-get install chromium`.")
    first = ".bcos-canvas:not(.bcos-plain) .bcos-panel .bcos-kept"
    with tempfile.TemporaryDirectory() as place, started_chromium() as browser:
        folder = fill_demo(Path(place))
        names = [notebook(folder, "four.ipynb", FOUR), notebook(folder, "five.ipynb", FIVE.replace("AHEAD", "0")), notebook(folder, "ahead.ipynb", FIVE.replace("AHEAD", "4"))]
        with started_lab(folder) as server:
            with open_notebook(browser, server, "thresholds.ipynb") as page:
                page.locator(first).first.wait_for(timeout=200_000)
                yield "first picture after run all", time.perf_counter() - page.began
            with open_notebook(browser, server, names[0]) as page:
                page.locator(first).nth(3).wait_for(timeout=200_000)
                page.wait_for_timeout(3000)
                slider_steps(page, 10)
                steps = sorted(slider_steps(page, 200))
            yield "slider step, 256 px, four maps: median", statistics.median(steps) / 1000
            yield "slider step, 256 px, four maps: 95 %", steps[int(0.95 * len(steps))] / 1000
            for name, what in zip(names[1:], ("next frame, five explainers", "next frame, computed ahead")):
                with open_notebook(browser, server, name) as page:
                    page.locator(first).nth(4).wait_for(timeout=200_000)
                    page.wait_for_timeout(6000)
                    page.evaluate(NEXT, 2)
                    taken = page.evaluate(NEXT, 12)
                yield what, statistics.median(taken) / 1000
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    yield "memory after 500 frames, MB", float(done.stdout.split()[-1])


def main():
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for name, value in explore_times():
        print(f"{name:45} {value:10.3f}   reach {REACH[name]:g} {'' if value <= REACH[name] else ' not reached'}", flush=True)


if __name__ == "__main__":
    main()
