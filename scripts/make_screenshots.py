"""Write docs/images/: a terminal, the server's page and an explanation, with the default model's own answers.

    python scripts/make_screenshots.py

needs the extras `test` and a browser (tests/support/browser.py says which). Pictures have few colours, to stay small.
"""

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import browser as browsers  # noqa: E402
from PIL import Image  # noqa: E402
from playwright.sync_api import Browser, Page, expect  # noqa: E402
from servers import running  # noqa: E402

from tinyserve import LLM  # noqa: E402
from tinyserve.checkpoints import hub  # noqa: E402

IMAGES = ROOT / "docs" / "images"
MODEL = "smollm2-135m"
MOST_BYTES = 150_000
COLOURS = 256
WIDTH = 80


def main() -> None:
    expect.set_options(timeout=300_000)
    IMAGES.mkdir(exist_ok=True)
    with running({MODEL: hub.resolve(MODEL)}, max_model_len=2048) as server, browsers.launched() as browser:
        page = opened(browser, server.url, color_scheme="light")
        ask(page, "What is the capital of France?")
        ask(page, "Why is the sky blue? Answer in two sentences.")
        least_certain(page).hover()
        save(page, "page-glass-box.png")
        page.locator("#panel summary", has_text="Model").click()
        expect(page.locator(".layers li")).to_have_count(30)
        page.mouse.move(0, 0)
        save(page, "page-model.png")
        page = opened(browser, server.url, color_scheme="dark")
        page.locator("label.switch").click()
        ask(page, "Write a Python function that adds two numbers.")
        save(page, "page-dark.png")
        page = opened(browser, server.url, 390, 700, color_scheme="light", has_touch=True, is_mobile=True)
        ask(page, "What is the capital of France?")
        page.get_by_role("option", name="Paris,").tap()
        save(page, "page-phone.png")
    explain = f'tinyserve explain {MODEL} "The capital of France is"'
    terminal("terminal.svg", 'tinyserve ask "What is the capital of France?"', f"{explain} | grep -A7 '^22 '")
    with LLM(MODEL) as llm:
        figure = llm.explain("The capital of France is").plot(12)
    path = IMAGES / "explain.svg"
    figure.savefig(path, metadata={"Date": None})
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes")


def terminal(name: str, *commands: str) -> None:
    """What some commands print, as a terminal shows it."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=WIDTH, file=io.StringIO())
    for command in commands:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, check=True,
            env={**os.environ, "COLUMNS": str(WIDTH), "PATH": path},
        )  # fmt: skip
        console.print(Text(f"$ {command}", style="bold"))
        console.print(Text(f"{done.stdout.rstrip()}\n{done.stderr}".strip()), "")
    picture = re.sub(
        r"@font-face \{.*?\}", "", console.export_svg(title="tinyserve"), flags=re.DOTALL
    )  # from elsewhere
    lines = [line.rstrip() for line in picture.splitlines()]
    (IMAGES / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def opened(browser: Browser, url: str, width: int = 1280, height: int = 800, **options: Any) -> Page:
    """The page in a browser that knows nothing yet, set to give the same answers each time."""
    page = browser.new_context(viewport={"width": width, "height": height}, **options).new_page()
    page.goto(url)
    expect(page.locator("#status")).to_have_text("Ready")
    page.evaluate("() => localStorage.setItem('tinyserve.settings', JSON.stringify({temperature: 0, max_tokens: 160}))")
    page.reload()
    return page


def ask(page: Page, question: str) -> None:
    page.locator("#prompt").fill(question)
    page.locator("#prompt").press("Enter")
    expect(page.locator("#send")).to_have_text("Stop")
    expect(page.locator("#status")).to_have_text("Ready")


def least_certain(page: Page) -> Any:
    """The first of the last answer's least probable tokens."""
    last = page.locator(".turn.assistant").last.get_by_role("option")
    heats = last.evaluate_all("tokens => tokens.map((token) => Number(token.dataset.heat))")
    return last.nth(heats.index(max(heats)))


def save(page: Page, name: str) -> None:
    """Write a picture with few colours; raises SystemExit where it is large all the same."""
    page.wait_for_timeout(300)  # a switch slides
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    path = IMAGES / name
    picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path.relative_to(ROOT)}: {size} bytes")
    if size > MOST_BYTES:
        raise SystemExit(f"{path} has {size} bytes, and {MOST_BYTES} are the most.")


if __name__ == "__main__":
    main()
