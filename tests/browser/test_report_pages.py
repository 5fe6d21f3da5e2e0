"""Reports opened from disk, without a network: light and dark, wide and narrow."""

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Request, Route, expect

from cifar_lib import ROOT

WIDTHS = {"desktop": 1280, "phone": 390}
# What a page shows or leads to, images as they are where the browser has chosen one.
TARGETS = """() => [
    ...[...document.querySelectorAll("a[href]")].map(link => link.href),
    ...[...document.querySelectorAll("img")].map(image => image.currentSrc || image.src),
    ...[...document.forms].map(form => form.action),
    ...[...document.querySelectorAll("link[href]")].map(link => link.href),
    ...[...document.querySelectorAll("script[src]")].map(script => script.src),
]"""
# Without preload: axe would read style sheets again, which no page may do that is opened from disk.
AXE = {"resultTypes": ["violations"], "preload": False}
# What else axe looks at is the same in every scheme.
OF_COLOURS = {"runOnly": ["color-contrast", "link-in-text-block"]}
OVERFLOW = "document.documentElement.scrollWidth - window.innerWidth"
# What is folded away is neither laid out nor looked at by axe; it takes a moment to fade in.
UNFOLD = """() => {
    document.querySelectorAll("details").forEach(details => details.open = true)
    return Promise.all(document.getAnimations().map(animation => animation.finished))
        .then(() => null)
}"""
BROKEN = """() => [...document.images].filter(image => image.complete && !image.naturalWidth)
    .map(image => image.src)"""


@pytest.fixture(scope="session", params=["committed", "small"])
def index(request: pytest.FixtureRequest, small_report: Future) -> Path:
    """The index of a report."""
    return small_report.result() if request.param == "small" else ROOT / "reports" / "index.html"


@pytest.fixture
def faults() -> list[str]:
    """What the pages complained of, or asked the network for."""
    return []


@pytest.fixture(params=["light", "dark"])
def scheme(request: pytest.FixtureRequest) -> str:
    """What the reader's system asks pages to be."""
    return request.param


@pytest.fixture
def page(browser: Browser, scheme: str, faults: list[str]) -> Iterator[Page]:
    """A page that reaches nothing but files."""

    def files_alone(route: Route) -> None:
        if route.request.url.startswith(("file:", "blob:", "data:")):
            route.continue_()
        else:
            faults.append(f"asked the network: {route.request.url}")
            route.abort()

    def failed(request: Request) -> None:
        faults.append(f"failed: {request.url} ({request.failure})")

    context = browser.new_context(color_scheme=scheme)
    context.route("**/*", files_alone)
    page = context.new_page()
    page.on("requestfailed", failed)
    page.on("pageerror", lambda error: faults.append(f"raised: {error}"))
    page.on(
        "console",
        lambda message: message.type == "error" and faults.append(f"console: {message.text}"),
    )
    yield page
    context.close()


def local(targets: list[str], base: str) -> tuple[set[Path], list[str]]:
    """The files that these lead to, and those among them that are not there."""
    paths = {
        Path(unquote(urlsplit(target).path))
        for target in targets
        if target.startswith("file:") and not target.startswith(f"{base}#")
    }
    return paths, sorted(str(path) for path in paths if not path.exists())


def test_the_table_of_runs_is_sorted_by_a_click(index, page, faults):
    page.goto(index.as_uri())
    table = page.locator("table.sortable")
    head, rows = table.locator("thead th").first, table.locator("tbody tr")
    expect(head).to_contain_class("dt-orderable-asc")  # the script has loaded
    stored = rows.all_inner_texts()
    assert len(stored) > 1
    names = []
    for order in ("ascending", "descending"):
        head.click()
        expect(head).to_have_attribute("aria-sort", order)
        assert sorted(rows.all_inner_texts()) == sorted(stored)
        names.append(rows.locator("td:first-child").all_inner_texts())
    assert names == [sorted(names[0]), sorted(names[0], reverse=True)]
    assert not faults


def test_every_page_stands_on_every_screen(index, page, faults, scheme, artefacts):
    kept = artefacts / ("committed" if index.is_relative_to(ROOT) else "small")
    kept.mkdir(exist_ok=True)
    axe = Axe()
    waiting, seen = [index], set()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        for screen, width in WIDTHS.items():
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(path.as_uri(), wait_until="load")
            where = f"{path.name}, {screen}, {scheme}"
            page.screenshot(path=kept / f"{path.stem}-{screen}-{scheme}.jpg", full_page=True)
            if screen == "desktop":
                page.evaluate(UNFOLD)
            overflow = page.evaluate(OVERFLOW)
            if overflow > 0:
                faults.append(f"{where}: {overflow} pixels too wide")
            faults += [f"{where}: no picture in {broken}" for broken in page.evaluate(BROKEN)]
            options = AXE if scheme == "light" else AXE | OF_COLOURS
            for violation in axe.run(page, options=options).response["violations"]:
                if violation["impact"] in ("serious", "critical"):
                    nodes = [node["html"][:200] for node in violation["nodes"]]
                    faults.append(
                        f"{where}: {violation['help']} ({violation['id']}, {len(nodes)} times): "
                        f"{nodes[0]}"
                    )
        targets, missing = local(page.evaluate(TARGETS), path.as_uri())
        faults += [f"{path.name} leads to {target}, which is not there" for target in missing]
        pages = {target for target in targets if target.suffix == ".html" and target.exists()}
        waiting += sorted(pages - seen - set(waiting))
    assert not faults, "\n".join(faults)
    assert {path.name for path in index.parent.glob("*.html")} <= {path.name for path in seen}
