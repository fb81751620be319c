"""A server in a folder of its own, and Debian's Chromium looking at it, with no way to any other host."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
ONLY_HERE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"
SECONDS_TO_LISTEN = 30.0


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Whether to leave a file out: collecting test_openapi.py builds cases of every address, and all its tests are
    slow.
    """
    is_left_out = collection_path.name == "test_openapi.py" and config.getoption("markexpr") == "not slow"
    return True if is_left_out else None


@dataclass
class Server:
    """`simpletuner server` in `workspace`; it can be killed and started again on the same port."""

    workspace: Path
    environment: dict[str, str]
    flags: tuple[str, ...] = ()
    port: int = 0
    process: subprocess.Popen[str] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> float:
        """Start it, on a free port the first time; returns the seconds until it said where it listens."""
        began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "simpletuner", "server", f"--port={self.port}", *self.flags],
            cwd=self.workspace,
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        told = ""
        for line in self.process.stdout:
            told += line
            if found := re.search(r"https?://[\w.\[\]:]+?:(\d+)", line):
                self.port = int(found[1])
                return time.monotonic() - began
        raise AssertionError(f"the server ended:\n{told}")

    def kill(self) -> None:
        """As a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            if self.process.stdout is not None:
                self.process.stdout.close()
            assert self.process.stdout is not None
            self.process.stdout.close()

    def stop(self) -> int:
        """As Ctrl-C would; returns the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=20)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace"
    folder.mkdir()
    return folder


@pytest.fixture
def server(workspace: Path) -> Iterator[Server]:
    """A server over an empty workspace, started. Runs that it started are ended with it."""
    found = Server(workspace, {"OMP_NUM_THREADS": "1"})
    found.start()
    yield found
    found.kill()
    end_runs(workspace)


def end_runs(workspace: Path) -> None:
    """End what goes on in the background below `workspace`: it was started to outlive the server."""
    for lock in (*workspace.rglob("lock"), *workspace.rglob("starting.lock")):
        text = lock.read_text().strip() if lock.is_file() else ""
        if text.isdecimal() and Path(f"/proc/{text}/cwd").exists():
            os.kill(int(text), signal.SIGKILL)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    assert path is not None, f"expected a Chromium ({', '.join(NAMES)}): apt-get install chromium"
    with sync_playwright() as playwright:
        # Without its own sandbox, which root and containers cannot have.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", ONLY_HERE])
        yield browser
        browser.close()


@dataclass
class Watched:
    """What the page did that it must not."""

    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    allowed: Callable[[str], bool] = lambda _text: False
    """Errors that a test provokes."""

    def console(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not self.allowed(message.text):
            self.errors.append(message.text)

    def request(self, request: Request) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "blob:")):
            self.foreign.append(request.url)


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    context.set_default_timeout(15_000)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, watched: Watched) -> Iterator[Page]:
    """A page that must say no error in its console and ask no other host for anything."""
    page = context.new_page()
    page.on("console", watched.console)
    page.on("pageerror", lambda error: watched.errors.append(str(error)))
    page.on("request", watched.request)
    yield page
    assert watched.foreign == []
    assert watched.errors == []
