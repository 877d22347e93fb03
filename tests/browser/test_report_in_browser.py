"""The report as its readers see it: in a browser, without a network, whatever a transcript holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import Opened
from reports import HOSTILE, many_utterances, metrics_of, utterance, write_run
from reports import make_search as searched

from service.report.compare import compare, compare_page
from service.report.page import report_page
from service.report.run import read_run
from service.storage import Storage

Open = Callable[..., Opened]

CURVES = ["curve-wer", "curve-loss", "curve-lr", "curve-grad-norm", "curve-clips-per-s"]
SEARCHED = ["parallel-coordinates", "importance", "score-by-size", "best-by-time", "trials-by-time"]


def page_of(root: Storage, folder: Path) -> Path:
    path = folder / "report.html"
    path.write_text(report_page(root), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a search of 40 trials with two failed ones, with 400 utterances in four languages."""
    folder = tmp_path_factory.mktemp("report")
    base, tuned = many_utterances(400, error_rate=0.3), many_utterances(400, error_rate=0.1)
    root = write_run(folder / "run", base=base, tuned=tuned, search=searched(), metrics=metrics_of(base, tuned))
    return page_of(root, folder)


SAMPLES = """(place) => {
    const box = place.querySelector("svg.main-svg").getBoundingClientRect();
    const shapes = [...place.querySelectorAll(".scatterlayer .trace path, .barlayer .point path")];
    const size = (shape) => shape.getBoundingClientRect().width + shape.getBoundingClientRect().height;
    const seen = shapes.filter((shape) => size(shape) > 2);
    return {
        width: box.width, height: box.height, shapes: seen.length,
        traces: place.data.length, empty: place.data.filter((trace) => !trace.x.length || !trace.y.length).length,
        label: place.getAttribute("aria-label"),
    };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1600])
def test_every_plot_is_drawn_at_any_width_in_light_and_dark(
    report: Path, open_page: Open, scheme: str, width: int
) -> None:
    opened = open_page(report, width=width, color_scheme=scheme)
    opened.draw_all()
    ids = opened.page.evaluate('[...document.querySelectorAll(".canvas")].map((one) => one.id)')
    assert sorted(ids) == sorted([*SEARCHED, *CURVES, "errors-by-length", "clip-lengths"])
    for name in ids:
        found = opened.page.locator(f"#{name}").evaluate(SAMPLES)
        assert found["traces"] > 0, name
        assert found["empty"] == 0, name
        assert found["shapes"] >= found["traces"] / 2, (name, found)
        assert found["width"] > 250, (name, found)
        assert found["height"] > 150, (name, found)
        assert len(found["label"]) > 30
    overflow = opened.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow == 0
    opened.require_calm()


def test_plots_take_the_colours_of_the_page_and_change_with_them(report: Path, open_page: Open) -> None:
    opened = open_page(report, color_scheme="light")
    opened.draw_all()

    def line() -> tuple[str, str]:
        stroke = "#curve-loss .scatterlayer path.js-line"
        colour = f"getComputedStyle(document.querySelector('{stroke}')).stroke"
        return opened.page.evaluate(colour), opened.page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = line()
    opened.page.emulate_media(color_scheme="dark")
    opened.wait('document.getElementById("curve-loss").dataset.drawn === "dark"')
    dark = line()
    assert light == ("rgb(31, 95, 208)", "rgb(246, 247, 249)")
    assert dark == ("rgb(127, 176, 255)", "rgb(16, 19, 23)")
    opened.require_calm()


CONTRAST = """() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgb = (css) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = css;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const linear = (value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
    const behind = (node) => {
        for (; node; node = node.parentElement) {
            const colour = rgb(getComputedStyle(node).backgroundColor);
            if (colour[3] > 250) return colour;
        }
        return [255, 255, 255, 255];
    };
    const poor = [];
    for (const node of document.querySelectorAll("main *, nav a, footer p")) {
        if (node.closest(".canvas, .hidden, noscript, [hidden]")) continue;
        if (![...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim())) continue;
        const both = [luminance(rgb(getComputedStyle(node).color)), luminance(behind(node))];
        const ratio = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
        if (ratio < 4.5) poor.push([node.tagName, node.className, node.textContent.slice(0, 20), ratio]);
    }
    return poor;
}"""
"""Texts whose contrast is too low."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_what_is_behind_it(report: Path, open_page: Open, scheme: str) -> None:
    """WCAG 2.2, 1.4.3: a contrast of 4.5 to 1."""
    assert open_page(report, color_scheme=scheme).page.evaluate(CONTRAST) == []


def errors_are_falling(opened: Opened) -> bool:
    shown = opened.page.evaluate(
        r"""[...document.querySelectorAll(".list .meta")].map((one) => Number(/tuned (\d+)/.exec(one.innerText)[1]))"""
    )
    return bool(shown == sorted(shown, reverse=True))


def test_the_worst_utterances_come_first_and_more_on_demand(report: Path, open_page: Open) -> None:
    opened = open_page(report)
    rows = opened.page.locator(".list > li")
    assert rows.count() == 20
    assert errors_are_falling(opened)
    assert opened.texts(".count") == ["20 shown of 400 utterances"]
    opened.page.get_by_role("button", name="Show more").click()
    assert rows.count() == 40
    assert errors_are_falling(opened)
    assert opened.page.evaluate("[...document.querySelectorAll('.list > li')].indexOf(document.activeElement)") == 20
    opened.require_calm()


def test_the_language_filter_keeps_one_language_in_list_and_tables(report: Path, open_page: Open) -> None:
    opened = open_page(report)
    before = opened.texts(".confusions .pairing")
    opened.page.locator("select[name=language]").select_option(label="Arabic")
    opened.wait('document.querySelector(".count").textContent.includes("that match")')
    assert {"Arabic"} == set(opened.texts(".list .meta > span:nth-child(2)"))
    assert opened.page.locator(".list .words").first.get_attribute("dir") == "rtl"
    after = opened.texts(".confusions .pairing")
    assert after != before
    assert all(any("\u0600" <= sign <= "\u06ff" for sign in text) for text in after)
    opened.require_calm()


def test_the_text_filter_looks_at_references_hypotheses_and_names(report: Path, open_page: Open) -> None:
    opened = open_page(report)
    field = opened.page.get_by_label("Text or file name")
    for text, expected in (("en/00", r"en/00\d\d\d\.flac"), ("GARDEN", "garden"), ("turn the", "turn the")):
        field.fill("")
        opened.wait('document.querySelector(".count").textContent === "20 shown of 400 utterances"')
        field.fill(text)
        opened.wait('document.querySelector(".count").textContent.includes("that match")')
        found = opened.page.locator(".list > li")
        assert 0 < found.count() <= 20
        if text == "en/00":
            assert all("en/00" in name for name in opened.texts(".list .file"))
        else:
            opened.page.evaluate("document.querySelectorAll('.list details').forEach((one) => (one.open = true))")
            opened.wait("document.querySelectorAll('.list details p').length > 2")
            texts = opened.page.evaluate(
                "[...document.querySelectorAll('.list > li')].map((one) => one.textContent.toLowerCase())"
            )
            assert all(expected in one for one in texts)
    field.fill("no such words anywhere")
    opened.wait('document.querySelector(".count").textContent.startsWith("None of 400")')
    assert opened.page.locator(".list > li").count() == 0
    opened.require_calm()


def test_the_change_filter_parts_better_from_worse(report: Path, open_page: Open) -> None:
    opened = open_page(report)
    for value, mark in (("worse", ["worse"]), ("better", ["better"]), ("same", [])):
        opened.page.get_by_label("Change").select_option(value)
        opened.wait('document.querySelector(".count").textContent.includes("that match")')
        assert opened.page.locator(".list > li").count() > 0
        assert sorted(set(opened.texts(".list .meta .worse, .list .meta .better"))) == mark


def test_orders_are_those_that_they_say(report: Path, open_page: Open) -> None:
    opened = open_page(report)
    opened.page.get_by_label("Order").select_option("long")
    opened.wait('parseFloat(document.querySelector(".list .meta > span:nth-child(3)").textContent) > 27')
    seconds = [float(text.split(" s")[0]) for text in opened.texts(".list .meta > span:nth-child(3)")]
    assert seconds == sorted(seconds, reverse=True)


def test_a_frequent_error_leads_to_its_utterances_and_back(report: Path, open_page: Open) -> None:
    opened = open_page(report)
    first = opened.page.locator(".confusions .pairing").first
    said, heard = first.locator("bdi").all_text_contents()
    count = int(first.locator("xpath=ancestor::tr/td[last()]").inner_text())
    first.click()
    assert opened.texts(".pair span") == [f"Only utterances with “{said}” heard as “{heard}”."]
    found = opened.page.evaluate("document.querySelectorAll('.list > li').length")
    assert 0 < found <= count
    pairs = opened.page.evaluate(
        """[...document.querySelectorAll(".list > li")].map((row) => [...row.querySelectorAll(".word")].map(
            (word) => [word.children[0].textContent, word.lastElementChild.querySelector("mark.s")?.textContent]))"""
    )
    assert all([said, heard] in row for row in pairs)
    opened.page.get_by_role("button", name="show all again").click()
    assert opened.texts(".count") == ["20 shown of 400 utterances"]


def test_errors_are_told_apart_without_colour(report: Path, open_page: Open) -> None:
    opened = open_page(report)
    for kind, style in (("s", "borderBottomStyle"), ("i", "textDecorationLine"), ("d", "textDecorationLine")):
        value = opened.page.evaluate(f"getComputedStyle(document.querySelector('.list mark.{kind}')).{style}")
        assert value == {"s": "dotted", "i": "underline", "d": "line-through"}[kind]
        assert opened.page.locator(f".list mark.{kind}").first.get_attribute("title")
    assert opened.page.locator(".legend mark").count() == 3


def column_of(opened: Opened, title: str) -> list[str]:
    heads = [text.strip() for text in opened.texts("#trials thead th")]
    return opened.texts(f"#trials tbody tr > :nth-child({heads.index(title) + 1})")


def test_the_trial_table_is_sorted_by_numbers_with_what_has_none_last(report: Path, open_page: Open) -> None:
    opened = open_page(report)
    head = opened.page.locator("#trials").get_by_role("button", name="WER", exact=True)
    cell = head.locator("xpath=..")
    assert cell.get_attribute("aria-sort") == "none"
    for direction in ("ascending", "descending"):
        head.click()
        assert cell.get_attribute("aria-sort") == direction
        shown = column_of(opened, "WER")
        assert shown[-2:] == ["–", "–"], "those that failed have no score"
        rates = [float(text.rstrip("%")) for text in shown[:-2]]
        assert len(rates) == 39
        assert rates == sorted(rates, reverse=direction == "descending")
    opened.page.locator("#trials").get_by_role("button", name="lr", exact=True).focus()
    opened.page.keyboard.press("Enter")
    rates = [float(text) for text in column_of(opened, "lr") if text != "–"]
    assert rates == sorted(rates)
    opened.require_calm()


def test_a_box_over_an_axis_keeps_the_trials_that_pass_there(report: Path, open_page: Open) -> None:
    opened = open_page(report, width=1280, height=1000)
    opened.draw_all()
    plot = opened.page.locator("#parallel-coordinates")
    plot.scroll_into_view_if_needed()
    # The upper half of the axis of the rates: those above the middle of the magnitudes.
    where = plot.evaluate(
        """(place) => {
            const { xaxis, yaxis } = place._fullLayout, box = place.getBoundingClientRect();
            const at = (x, y) => [box.left + xaxis._offset + xaxis.l2p(x), box.top + yaxis._offset + yaxis.l2p(y)];
            return [at(-0.15, 1.03), at(0.15, 0.5)];
        }"""
    )
    (left, top), (right, bottom) = where
    opened.page.mouse.move(left, top)
    opened.page.mouse.down()
    opened.page.mouse.move((left + right) / 2, (top + bottom) / 2)
    opened.page.mouse.move(right, bottom)
    opened.page.mouse.up()
    opened.page.wait_for_selector("#search .chosen:not([hidden])")
    rows = opened.page.locator("#trials tbody tr:visible")
    expected = plot.evaluate(
        "(place) => place.data.filter((trace) => trace.y[0] >= 0.5).map((trace) => trace.meta).sort()"
    )
    assert sorted(rows.evaluate_all("(found) => found.map((row) => row.dataset.id)")) == expected
    assert 0 < len(expected) < 38
    faint = plot.evaluate("(place) => place.data.filter((trace) => trace.opacity < 0.5).length")
    assert faint == 38 - len(expected)
    # On a busy machine the two clicks of one may lie too far apart for the plot.
    for _ in range(5):
        opened.page.mouse.dblclick((left + right) / 2 + 60, bottom - 20)
        opened.page.wait_for_timeout(1000)
        if not opened.page.locator("#search .chosen").is_visible():
            break
    opened.page.wait_for_selector("#search .chosen", state="hidden")
    assert rows.count() == 41
    opened.require_calm()


def whole(text: str) -> str:
    """The text without lone surrogates, for which the driver has a sign of its own."""
    return "".join("?" if "\ud800" <= sign <= "\udfff" or sign == "\ufffd" else sign for sign in text)


def test_hostile_transcripts_stay_text(tmp_path: Path, open_page: Open) -> None:
    lines = [utterance(f"/data/{text[:60]}.wav", f"said {text}", f"heard {text} more") for text in HOSTILE.values()]
    base = [utterance(f"/data/{text[:60]}.wav", f"said {text}", text) for text in HOSTILE.values()]
    rejects = "split,path,kind,reason\n" + f'train,"{HOSTILE["image"].replace(chr(34), chr(34) * 2)}",silent,<b>x</b>\n'
    reasons = [HOSTILE["image"], HOSTILE["script"], HOSTILE["template"]]
    metrics = metrics_of(base, lines, promoted=False, promotion_reasons=reasons)
    settings = {"name": None, "training": {"base_model": HOSTILE["script"], "lora_target_modules": [HOSTILE["image"]]}}
    root = write_run(tmp_path / "run", base=base, tuned=lines, rejects=rejects, metrics=metrics, spec=settings)
    opened = open_page(page_of(root, tmp_path), width=390)
    opened.draw_all()
    opened.page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    opened.wait(f"document.querySelectorAll('.list details p').length === {3 * len(HOSTILE)}")
    shown = opened.page.locator(".list details bdi").all_text_contents()
    for name, text in HOSTILE.items():
        kept = f"said {text}".replace("\x85", "\x85")
        assert kept.encode("utf-8", "replace").decode() in [one.encode("utf-8", "replace").decode() for one in shown], (
            name
        )
    assert opened.page.locator("main img, main script, main iframe, .list li li").count() == 0
    assert HOSTILE["template"] in opened.page.locator("#verdict").inner_text(), "no template reads it"
    for field_text in ("<img", "</script>", "{{7*7}}", "1b[2J", "egnih"):
        opened.page.get_by_label("Text or file name").fill(field_text)
    opened.page.locator(".confusions .pairing").first.click()
    overflow = opened.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow == 0
    opened.require_calm()


def test_a_script_that_got_into_the_page_would_not_run(report: Path, tmp_path: Path, open_page: Open) -> None:
    """The policy holds by itself, should a text ever get out of its place."""
    torn = tmp_path / "torn.html"
    content = report.read_text("utf-8")
    torn.write_text(content.replace("</main>", '<script>alert("in")</script><img src=x onerror="alert(1)"></main>'))
    opened = open_page(torn)
    opened.wait('document.readyState === "complete"')
    assert opened.dialogs == []
    assert opened.refused == opened.requests == [(tmp_path / "x").as_uri()]
    assert any("Content Security Policy" in line for line in opened.console)


def test_five_thousand_utterances_open_and_are_searched_at_once(tmp_path: Path, open_page: Open) -> None:
    base, tuned = many_utterances(5000, error_rate=0.3), many_utterances(5000, error_rate=0.1)
    path = page_of(write_run(tmp_path / "run", base=base, tuned=tuned, metrics=metrics_of(base, tuned)), tmp_path)
    started = time.monotonic()
    opened = open_page(path)
    opening = time.monotonic() - started
    assert opened.texts(".count") == ["20 shown of 5,000 utterances"]
    started = time.monotonic()
    opened.page.get_by_label("Text or file name").fill("doctor garden turn")
    opened.wait('document.querySelector(".count").textContent.includes("that match")')
    searching = time.monotonic() - started
    assert opening < 10, f"{opening:.1f} s"  # about 1 s on an idle machine
    assert searching < 5, f"{searching:.1f} s"  # about 0.3 s
    assert opened.page.evaluate("document.querySelectorAll('.list > li').length") <= 20
    opened.require_calm()


def test_the_page_is_printed_in_full_and_in_dark_ink(report: Path, open_page: Open) -> None:
    opened = open_page(report, color_scheme="dark")
    opened.page.evaluate(
        """window.addEventListener("beforeprint", () => {
            window.printed = {
                undrawn: [...document.querySelectorAll(".canvas")].filter((one) => !one.dataset.drawn).length,
                text: getComputedStyle(document.body).color,
                line: getComputedStyle(document.querySelector("#curve-loss path.js-line")).stroke,
            };
        })"""
    )
    assert opened.page.pdf(format="A4").startswith(b"%PDF")
    assert opened.page.evaluate("window.printed") == {
        "undrawn": 0,
        "text": "rgb(27, 31, 36)",
        "line": "rgb(31, 95, 208)",
    }
    assert opened.page.evaluate("getComputedStyle(document.body).color") == "rgb(230, 233, 238)"
    opened.require_calm()


def test_the_page_can_be_used_by_keyboard(report: Path, open_page: Open) -> None:
    opened = open_page(report)
    opened.page.keyboard.press("Tab")
    assert opened.page.evaluate("document.activeElement.className") == "skip"
    names = set()
    for _ in range(300):
        opened.page.keyboard.press("Tab")
        names.add(
            opened.page.evaluate(
                "document.activeElement.name || document.activeElement.className || document.activeElement.tagName"
            )
        )
        if "order" in names:
            break
    assert {"A", "BUTTON", "scroll", "pairing", "language", "text", "change", "order"} <= names


def test_runs_compared_are_a_page_with_both_hypotheses(tmp_path: Path, open_page: Open) -> None:
    roots = []
    for name, rate in (("one", 0.3), ("two", 0.1)):
        lines = many_utterances(100, error_rate=rate)
        lines += [utterance(f"/data/{name}.wav", HOSTILE["image"], f"{HOSTILE['script']} {name}")]
        roots.append(write_run(tmp_path / name, base=lines, tuned=lines, metrics=metrics_of(lines, lines, job_id=name)))
    path = tmp_path / "compare.html"
    path.write_text(compare_page(compare([read_run(root) for root in roots])), encoding="utf-8")
    opened = open_page(path, width=390, color_scheme="dark")
    assert opened.texts(".count") == ["20 shown of 100 utterances"]
    assert "two" in opened.texts(".list .names span")
    opened.page.get_by_label("Change").select_option("better")
    opened.wait('document.querySelector(".count").textContent.includes("that match")')
    assert set(opened.texts(".list .meta .better")) == {"better"}
    assert opened.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert opened.page.evaluate(CONTRAST) == []
    opened.require_calm()
