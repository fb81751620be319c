"""Measure how long the curves of a long run take in a browser: from the click on the run to the last drawn chart.

    python benchmarks/page.py [--steps 100000] [--rounds 5] [--source SRC]

Starts the real server over a scratch folder with a run of that many steps and opens it in Chromium, each round in a new
window. `--source` serves the page of another checkout, for a comparison. A chart counts as drawn once its
canvas has a pixel in the color of its line.
"""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from simpletuner.runs.events import EndEvent, EventLog, PhaseEvent, RunEvent, StepEvent
from simpletuner.runs.layout import RunDirectory

CHARTS = 5
"""Charts with a line: the held-out loss has none in this run."""
DRAWN = """async ([charts]) => {
    const pen = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
    pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--part-1");
    pen.fillRect(0, 0, 1, 1);
    const [red, green, blue] = pen.getImageData(0, 0, 1, 1).data;
    const isDrawn = (canvas) => {
        if (canvas.width === 0 || canvas.height === 0) return false;
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        for (let place = 0; place < data.length; place += 4) {
            if (data[place] === red && data[place + 1] === green && data[place + 2] === blue) return true;
        }
        return false;
    };
    const seen = new Set();
    while (seen.size < charts) {
        await new Promise(requestAnimationFrame);
        for (const canvas of document.querySelectorAll(".chart canvas")) {
            if (!seen.has(canvas) && isDrawn(canvas)) seen.add(canvas);
        }
    }
    return performance.now() - window.clicked;
}"""
CLICK = """() => {
    addEventListener("click", () => (window.clicked = performance.now()), { capture: true, once: true });
}"""
KEYS = 20
CURSOR = """async ([keys]) => {
    const slider = document.querySelector(".chart [role=slider]");
    const began = performance.now();
    for (let key = 0; key < keys; key += 1) {
        slider.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft", bubbles: true }));
        await new Promise(requestAnimationFrame);
    }
    return (performance.now() - began) / keys;
}"""


def write_run(folder: Path, steps: int) -> None:
    """A finished run of `steps` steps."""
    run = RunDirectory(folder)
    run.create()
    run.config.write_text(json.dumps({"model_type": "lora", "seed": 42}))
    run.datasets.write_text("[]")
    with EventLog(run.events) as log:
        log.emit(RunEvent(program="benchmark", pid=1, resumed_from=None, steps=steps, pictures=1, trainable=1))
        log.emit(PhaseEvent(phase="train", state="begin"))
        for step in range(1, steps + 1):
            loss = 0.3 + 0.5 * math.exp(-step / 9000) + 0.05 * math.sin(step)
            log.emit(StepEvent(step=step, epoch=0, loss=loss, lr=1e-4, grad_norm=1, seconds=0.5, memory_gib=2))
        log.emit(EndEvent(reason="done", exit_code=0, step=steps, seconds=1.0))


def measure(browser: Browser, url: str) -> tuple[float, float]:
    """Milliseconds from the click to the last chart, and of one move of the cursor over all charts."""
    page = browser.new_page(viewport={"width": 1280, "height": 1600})
    try:
        page.goto(url)
        link = page.get_by_role("link", name="long")
        link.wait_for()
        page.wait_for_load_state("networkidle")
        page.evaluate(CLICK)
        link.click()
        return page.evaluate(DRAWN, [CHARTS]), page.evaluate(CURSOR, [KEYS])
    finally:
        page.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--source", type=Path, default=None)
    arguments = parser.parse_args()
    source = arguments.source or Path(__file__).parents[1] / "src"
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder) / "output" / "long", arguments.steps)
        command = [sys.executable, "-P", "-m", "simpletuner", "server", "--port=0"]
        environment = {**os.environ, "PYTHONPATH": str(source.resolve())}
        with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                found = re.search(r"http://localhost:\d+", server.stdout.readline())
                assert found is not None
                with sync_playwright() as playwright:
                    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                    taken = [measure(browser, found[0]) for _ in range(arguments.rounds + 1)][1:]
                    browser.close()
            finally:
                server.terminate()
    drawn, moved = zip(*taken, strict=True)
    print(f"{arguments.steps:,} steps, from the click to the last chart: median {statistics.median(drawn):.0f} ms")
    print(f"  of {', '.join(f'{one:.0f}' for one in sorted(drawn))}")
    print(f"one step of the cursor over all charts: median {statistics.median(moved):.1f} ms")


if __name__ == "__main__":
    main()
