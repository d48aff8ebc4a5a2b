"""The report in a real browser: phone and desk, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from finetune_api.job_evaluation import Prompt
from finetune_api.result import ForgettingResult
from finetune_trainer.comparison import Prices, compare, contender
from finetune_trainer.report import write_report
from tests.browser import Page, open_browser
from tests.results import answered, events, prompt_results, result

Scheme = Literal["light", "dark"]

# The contrast of each text with what is painted behind it, by WCAG 2.2's formula; the worst of all.
WORST_CONTRAST = """(() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.map(linear); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c.slice(0, 3);
    }
    return [255, 255, 255];
  };
  let worst = [99, ''];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), e = walker.currentNode.parentElement;
    if (!text || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), ink = parse(e.closest('svg') ? style.fill : style.color).slice(0, 3);
    const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst[0]) worst = [ratio, text];
  }
  return worst;
})()"""

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
CHARTS = """[...document.querySelectorAll('svg')].filter(s => s.getClientRects().length).map(s => ({
  name: s.getAttribute('aria-label'), width: s.getBoundingClientRect().width,
  height: s.getBoundingClientRect().height, marks: s.querySelectorAll('path').length,
  text: Math.min(...[...s.querySelectorAll('text')].map(t => t.getBoundingClientRect().height)),
}))"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with open_browser() as page:
        yield page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with an answer that has no space to break at, and one that would like to be a script."""
    folder = tmp_path_factory.mktemp("report")
    long = answered(Prompt(prompt="Say a long word", topic="T" * 90), "x" * 400, "https://example.com/" + "y" * 300)
    script = answered(Prompt(prompt="<script>document.title = 'taken'</script>"), "<img src=x>", "<b>bold</b>")
    prompts = prompt_results(long, script)
    prompts[0] = prompts[0].model_copy(update={"prompted": prompts[0].base})
    said = [prompt.base for prompt in prompts]
    model = contender(said, 2.5, (0.5, 0.25), Prices(worker_hour=1.0))
    compared = compare(model, model, model, checked=5, examples=4, system=True, held_out_answers=32)
    forgetting = ForgettingResult(passages=24, tokens=1524, perplexity_base=52.5, perplexity_tuned=67.4)
    whole = result(prompts).model_copy(update={"comparison": compared, "forgetting": forgetting})
    write_report(whole, events(), folder)
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_nothing_scrolls_sideways_and_all_text_is_readable(
    width: int, scheme: Scheme, page: Page, report: Path
) -> None:
    page.open(report, width=width, scheme=scheme)
    assert page.evaluate(OVERFLOW) == 0
    ratio, text = page.evaluate(WORST_CONTRAST)
    assert ratio >= 4.5, f"{text!r} has a contrast of {ratio:.2f}"


@pytest.mark.parametrize("width", [360, 1280])
def test_every_chart_is_drawn_at_a_readable_size(width: int, page: Page, report: Path) -> None:
    page.open(report, width=width, scheme="light")
    charts = page.evaluate(CHARTS)
    assert [chart["name"] for chart in charts] == [
        "Loss over steps",
        "Learning rate over steps",
        "Gradient norm over steps",
        "Tokens per second over steps",
        "Seconds of a step by part",
        "Rows by length in tokens",
    ]
    for chart in charts:
        assert chart["width"] > 250
        assert chart["height"] > 120
        assert chart["marks"] > 5
        assert chart["text"] >= 9, f"{chart['name']} has text of {chart['text']:.1f} pixels"


def test_the_page_follows_the_colour_scheme(page: Page, report: Path) -> None:
    colours = []
    for scheme in ("light", "dark"):
        page.open(report, width=1280, scheme=scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        colours.append(page.evaluate("getComputedStyle(document.querySelector('svg path[style*=accent]')).stroke"))
    assert len(set(colours)) == 4


def test_the_page_runs_no_script_and_asks_for_nothing_but_itself(page: Page, report: Path) -> None:
    page.requests.clear()
    page.open(report, width=1280, scheme="light")
    assert page.evaluate("document.title") == "quickstart · finetune report"
    assert page.evaluate("document.querySelectorAll('script, img, article b').length") == 0
    assert {r for r in page.requests if not r.startswith("data:")} == {report.as_uri()}
    assert page.problems == []
