"""
Look at the project's pages in a browser: screenshots in out/look; exit code 1 if a page has errors.

    make look
    python tools/look.py docs/index.html docs/text.html     # the same

Needs playwright (pip install playwright) and an installed Chromium; --chromium says where. Each
page is opened at two widths in light and dark. Errors are exceptions, messages of the console,
requests to anywhere but the page's folder, and a page that is wider than its window. For people who
change a page; the tests run without a browser.
"""
import argparse
import itertools
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Error, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
SIZES = (1280, 900), (390, 844)
PAGES = [ROOT / "docs" / name for name in ("index.html", "text.html")]
STATES = {"index": [f"#step={i}" for i in range(1, 8)]}  # page: the states that are opened


def open_page(browser, path, size, scheme, state=""):
    """-> the page, and the list to which its errors are added."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    errors = []

    def on_console(message):
        if message.type in ("error", "warning"):
            errors.append(message.text)

    def on_request(request):
        if not request.url.startswith(path.resolve().parent.as_uri() + "/"):
            errors.append(f"request: {request.url}")

    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", on_console)
    page.on("request", on_request)
    page.goto(path.resolve().as_uri() + state)
    page.wait_for_timeout(700)
    return page, errors


def look(browser, path, folder):
    """Screenshots of a page: what the window shows first, and all of it -> its errors."""
    found = []
    for size, scheme, state in itertools.product(SIZES, ("light", "dark"),
                                                 STATES.get(path.stem, [""])):
        page, errors = open_page(browser, path, size, scheme, state)
        name = f"{path.parent.name}_{path.stem}{state.strip('#')}_{size[0]}_{scheme}"
        page.screenshot(path=folder / f"{name}.png")
        # a window of the page's height: what sticks to the window's edge stays there
        height = page.evaluate("document.documentElement.scrollHeight")
        page.set_viewport_size({"width": size[0], "height": height})
        page.wait_for_timeout(300)
        page.screenshot(path=folder / f"{name}_all.png")
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        if wide > 0:
            errors.append(f"{wide} pixels wider than its window")
        found += [f"{name}: {error}" for error in errors]
        page.close()
    return found


def main():
    parser = argparse.ArgumentParser(description="Screenshots of the pages, and their errors.")
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES, help="default: those in docs")
    parser.add_argument("--chromium", help="the browser's path",
                        default=shutil.which("chromium") or shutil.which("google-chrome"))
    args = parser.parse_args()
    if args.chromium is None:
        raise ValueError("no Chromium found: install it, or name it with --chromium")
    folder = ROOT / "out" / "look"
    folder.mkdir(parents=True, exist_ok=True)
    errors = []
    with sync_playwright() as playwright:
        # without the sandbox, which root in a container cannot have; the pages are ours
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        for path in args.pages:
            errors += look(browser, path, folder)
            print(f"{path}: screenshots in {folder}")
        browser.close()
    if errors:
        sys.exit("\n".join(errors))


if __name__ == "__main__":
    try:
        main()
    except (Error, ValueError) as error:
        sys.exit(f"error: {error}")
