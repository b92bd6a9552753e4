"""The report view's modules in Chromium: how they read, draw and describe documents."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from itertools import pairwise

import pytest
import translations

from mxfp8.quant.format import PREFIXES
from mxfp8.quant.reports.conversion import MIN_SQNR, Block, LayerReport, Report

pytestmark = pytest.mark.comfy

NAMES = re.compile(r"\[(\w+)\]")  # of the values in a text

LAYERS = (
    LayerReport("a.1", "mxfp8", "quantized", "BF16", (64, 32), 4096, 2200, 31.0,
                Block(3, 0, 26.5), 1.2e-2, 2.1e-2),
    LayerReport("a.2", "kept", "excluded by preset", "BF16", (64, 32), 4096, 4096),
    LayerReport("a.10", "mxfp8", "quantized", "BF16", (64, 64), 8192, 4300, 22.5),
    LayerReport("b", "mxfp8", "quantized", "BF16", (32, 32), 2048, 1100, None),
)  # fmt: skip
REPORT = Report("x", "y", "auto", None, 18432, 11696, 1.0, 30.0, LAYERS)


@pytest.fixture(scope="module")
def view(comfy, browser):
    """A function that evaluates JavaScript with the modules in `documents` and `charts`."""
    page = browser.new_page()
    page.goto(f"{comfy.url}/system_stats")
    page.evaluate(
        """async () => {
            window.documents = await import("/extensions/ComfyUI-MXFP8/document.mjs");
            window.charts = await import("/extensions/ComfyUI-MXFP8/chart.mjs");
            window.read = (text) => documents.read(text);
        }"""
    )
    yield page.evaluate
    page.close()


def test_a_report_has_the_measures_that_its_layers_have(view):
    measures = view("(t) => read(t).measures.map((m) => m.key)", REPORT.to_json())
    assert measures == ["output_error", "sqnr_db", "bytes_after"]
    plain = Report(**{**vars(REPORT), "layers": LAYERS[1:]})
    measures = view("(t) => read(t).measures.map((m) => m.key)", plain.to_json())
    assert measures == ["sqnr_db", "bytes_after"]


@pytest.mark.parametrize("text", ["{}", '{"mxfp8_report": 2, "layers": []}', "[1]", "no JSON"])
def test_anything_but_a_document_is_an_error(view, text):
    assert view("(t) => { try { read(t); return null } catch (e) { return e.message } }", text)


@pytest.mark.parametrize(
    ("order", "words", "names"),
    [
        ("in order", "", ["a.1", "a.2", "a.10", "b"]),
        ("worst first", "", ["a.10", "a.1", "a.2", "b"]),  # without a value: last
        ("largest first", "", ["a.10", "a.2", "a.1", "b"]),
        ("by name", "", ["a.1", "a.2", "a.10", "b"]),  # numbers as numbers
        ("in order", "A. mxfp8", ["a.1", "a.10"]),
        ("in order", "preset", ["a.2"]),
        ("in order", "nothing has this", []),
    ],
)
def test_rows_are_sorted_and_filtered(view, order, words, names):
    arranged = view(
        """([text, order, words]) => {
            const { rows, measures } = read(text);
            const sqnr = measures.find((m) => m.key === "sqnr_db");
            return documents.arrange(rows.layers, sqnr, order, words).map((r) => r.name);
        }""",
        [REPORT.to_json(), order, words],
    )
    assert arranged == names


def drawn(view, document: str, measure: str, width: int = 400) -> dict:
    """The geometry of the bars of a measure."""
    return view(
        """([text, key, width]) => {
            const { rows, measures, data } = read(text);
            const m = measures.find((m) => m.key === key);
            const all = rows[m.rows];
            const at = charts.scale(all, m, data, 150);
            const svg = charts.bars(all, m, at, charts.colors(all), width);
            const number = (e, name) => Number(e.getAttribute(name));
            return {
                low: at.low, high: at.high, threshold: at.threshold, width: number(svg, "width"),
                bottom: at.y(at.low), top: at.y(at.high), step: Number(svg.dataset.step),
                bars: [...svg.querySelectorAll(".bar")].map((e) => ({
                    x: number(e, "x"), y: number(e, "y"), width: number(e, "width"),
                    height: number(e, "height"), fill: e.getAttribute("fill"),
                    label: e.getAttribute("aria-label"), kind: e.getAttribute("class"),
                })),
                axis: charts.axis(m, at).textContent,
            };
        }""",
        [document, measure, width],
    )


def test_heights_are_the_values(view):
    chart = drawn(view, REPORT.to_json(), "bytes_after")
    assert chart["low"] == 0
    pixels = (chart["bottom"] - chart["top"]) / chart["high"]
    for bar, layer in zip(chart["bars"], LAYERS, strict=True):
        assert bar["height"] == pytest.approx(layer.bytes_after * pixels, rel=1e-9)
        assert bar["y"] + bar["height"] == pytest.approx(chart["bottom"])


def test_decibels_have_a_threshold_and_no_zero(view):
    chart = drawn(view, REPORT.to_json(), "sqnr_db")
    assert chart["threshold"] == MIN_SQNR
    assert 0 < chart["low"] < 22.5 and chart["high"] >= 31
    assert "24.6 dB" in chart["axis"]
    good, kept, bad, lossless = chart["bars"]
    per_db = (chart["bottom"] - chart["top"]) / (chart["high"] - chart["low"])
    assert good["height"] == pytest.approx((31 - chart["low"]) * per_db)
    assert bad["height"] == pytest.approx((22.5 - chart["low"]) * per_db)
    assert "below" in bad["kind"] and "below" not in good["kind"]
    assert kept["height"] == lossless["height"] == 5
    assert kept["fill"] != good["fill"] == bad["fill"]
    assert good["label"] == "a.1, MXFP8, SQNR 31.00 dB, 64 by 32"
    assert "SQNR 22.50 dB, below the threshold of 24.60 dB" in bad["label"]
    assert kept["label"] == "a.2, not quantized, 64 by 32, excluded by preset"


def test_bars_stay_wide_enough_to_point_at(view):
    layers = [{**asdict(LAYERS[0]), "name": f"layer.{i}"} for i in range(900)]
    text = json.dumps({"mxfp8_report": 1, "layers": layers})
    chart = drawn(view, text, "sqnr_db")
    assert chart["step"] == 3 and chart["width"] == 2700
    boxes = chart["bars"]
    assert all(b["x"] + b["width"] <= a["x"] for b, a in pairwise(boxes))


def test_a_row_is_described_in_full(view):
    details = dict(view("(t) => documents.describe(read(t).rows.layers[0])", REPORT.to_json()))
    assert details == {
        "Shape": "64 x 32 BF16", "Format": "MXFP8", "Reason": "quantized",
        "Output error": "1.20e-2 (rounding to nearest 2.10e-2)", "SQNR": "31.00 dB",
        "Size": "2.20 kB (before 4.10 kB)", "Worst block": "row 3, block 0: 26.50 dB",
    }  # fmt: skip


def test_each_backend_has_its_own_color(view):
    layers = [
        {"name": n, "shape": [1, 1], "bytes": 9, "decision": d, "backend": b, "microseconds": t}
        for n, d, b, t in (("a", "mxfp8", "triton", 5.0), ("b", "mxfp8", "eager", 2500.0),
                           ("c", "kept", None, None))
    ]  # fmt: skip
    text = json.dumps({"mxfp8_backend_report": 1, "layers": layers})
    chart = drawn(view, text, "microseconds")
    assert len({bar["fill"] for bar in chart["bars"]}) == 3
    assert "Time 2.50 ms" in chart["bars"][1]["label"]


@pytest.mark.parametrize("key", ["mxfp8_comparison", "mxfp8_certificate"])  # new and old
def test_a_comparison_is_drawn_by_step_and_by_seed(view, key):
    text = json.dumps({
        key: 1,
        "steps": [{"step": 0, "divergence": 1e-3}, {"step": 1, "divergence": 2e-3}],
        "seeds": [{"seed": 7, "latent_snr_db": 30.5, "psnr_db": None}],
    })  # fmt: skip
    assert view("(t) => read(t).measures.map((m) => m.key)", text) == [
        "divergence", "latent_snr_db",
    ]  # fmt: skip
    first, second = drawn(view, text, "divergence")["bars"]
    assert second["height"] == pytest.approx(2 * first["height"])


LORA = {
    "kinds": ["LoRA", "DoRA"], "ranks": [4, 16], "strength": 0.8, "hit": 30, "missed": 4,
    "applied": {"beside the weight: low rank": 30, "merged by ComfyUI: no linear layer": 2},
    "bytes": 1_200_000,
}  # fmt: skip


def test_the_loras_of_a_report_are_drawn_and_described(view):
    layer = {"name": "a", "shape": [1, 1], "bytes": 9, "decision": "kept", "backend": "stock"}
    merged = {**LORA, "kinds": ["merged model"], "ranks": [], "strength": None, "hit": 10}
    text = json.dumps({"mxfp8_backend_report": 1, "layers": [layer], "adapters": [LORA, merged]})
    assert view("(t) => read(t).measures.map((m) => m.key)", text) == ["bytes", "hit"]
    first, second = drawn(view, text, "hit")["bars"]
    assert first["height"] == pytest.approx(3 * second["height"])
    assert first["label"] == "LoRA, DoRA, strength 0.8, LoRAs: linear layers changed 30"
    assert view("(t) => documents.describe(read(t).rows.adapters[0])", text) == [
        ["Rank", "4 to 16"],
        ["Layers", "30 beside the weight: low rank"],
        ["Layers", "2 merged by ComfyUI: no linear layer"],
        ["Linear layers without it", "4"],
        ["Size", "1.20 MB"],
        ["LoRAs: linear layers changed", "30"],
    ]


def test_the_loras_of_both_sides_of_a_comparison_are_drawn(view):
    sides = {"reference": {"adapters": [LORA]}, "model": {"adapters": [LORA, LORA]}}
    text = json.dumps({"mxfp8_comparison": 1, "seeds": [], **sides})
    names = view("(t) => read(t).rows.adapters.map((row) => row.name)", text)
    lora = "LoRA, DoRA, strength 0.8"
    assert names == [f"reference: {lora}", *[f"model: {lora}"] * 2]


def test_a_large_seed_keeps_its_digits(view):
    text = '{"mxfp8_comparison": 1, "seeds": [{"seed": 18446744073709551615, "psnr_db": 1.0}]}'
    assert view("(t) => read(t).rows.seeds[0].name", text) == "seed 18446744073709551615"


@pytest.mark.parametrize(
    ("measure", "values", "axis"),
    [
        ("bytes", [500, 250], ["0 B", "250 B", "500 B"]),
        ("divergence", [1.25, 0.5], ["0", "6.25e-1", "1.25e+0"]),
        ("divergence", [1e-10, 2e-10], ["0", "1e-10", "2e-10"]),
        ("latent_snr_db", [30.2, 31.0], ["28 dB", "29.5 dB", "31 dB"]),
    ],
)
def test_the_axis_is_labeled_in_the_units_of_the_measure(view, measure, values, axis):
    kind, rows = {
        "bytes": ("mxfp8_inspection", "layers"),
        "divergence": ("mxfp8_comparison", "steps"),
        "latent_snr_db": ("mxfp8_comparison", "seeds"),
    }[measure]
    text = json.dumps({kind: 1, rows: [{"name": "x", measure: v} for v in values]})
    labels = view(
        """([text, key]) => {
            const { rows, measures, data } = read(text);
            const m = measures.find((m) => m.key === key);
            const svg = charts.axis(m, charts.scale(rows[m.rows], m, data, 150));
            return [...svg.querySelectorAll("text")].map((e) => e.textContent);
        }""",
        [text, measure],
    )
    assert labels == axis


def test_a_saved_picture_has_the_whole_title_and_a_legend(view):
    texts, right, width, parsed = view(
        """(text) => {
            const { rows, measures, data } = read(text);
            const at = charts.scale(rows.layers, measures[0], data, 150);
            const palette = charts.colors(rows.layers);
            const parts = { palette, axis: charts.axis(measures[0], at),
                bars: charts.bars(rows.layers, measures[0], at, palette, 300) };
            const title = "word ".repeat(60).trim() + "\\nlast line";
            const theme = { "--mx-back": "#000000", "--mx-text": "#ffffff" };
            const made = charts.picture(title, parts, theme);
            const page = new DOMParser().parseFromString(made.text, "image/svg+xml");
            document.body.innerHTML = made.text;
            const texts = [...document.querySelectorAll("body > svg > text")];
            const widths = texts.map((t) => t.getBBox().x + t.getBBox().width);
            return [texts.map((t) => t.textContent), Math.max(...widths), made.width,
                page.querySelector("parsererror") === null];
        }""",
        REPORT.to_json(),
    )
    assert parsed
    assert " ".join(texts).split() == ["word"] * 60 + ["last", "line", "MXFP8", "not", "quantized"]
    assert right <= width


def showing(view, *documents: tuple[str, str]) -> dict:
    """What a view shows after these documents, one after the other."""
    return view(
        """async (documents) => {
            const { ReportView } = await import("/extensions/ComfyUI-MXFP8/report.mjs");
            const view = new ReportView();
            document.body.append(view.element);
            for (const [text, summary] of documents) {
                view.show(text, summary);
                if (!view.open) view.part("[name=open]").click();
                view._choose(0);
            }
            const shown = (selector) => view.part(selector).getClientRects().length > 0;
            const state = {
                chart: shown(".chart"), save: shown("[name=save]"), copy: shown("[name=copy]"),
                legend: shown(".legend"), details: shown(".details"), bars: view._drawn.length,
                summary: view.part(".summary").textContent,
                verdict: view.part(".verdict").textContent,
                level: view.part(".verdict").dataset.level,
                name: view.part(".details b")?.textContent ?? null,
                made: view.root.querySelectorAll("img, .summary b").length,
                orders: [...view.part("[name=order]").options].map((o) => o.textContent),
                measure: view.part("[name=measure]").value,
                button: view.part("[name=open]").textContent,
            };
            view.part("[name=open]").click();
            state.closed = !shown(".chart") && !shown(".summary") && !shown("[name=copy]");
            view.element.remove();
            return state;
        }""",
        list(map(list, documents)),
    )


def test_nothing_of_an_earlier_document_stays(view):
    empty = json.dumps({"mxfp8_inspection": 1, "layers": []})
    shown = showing(view, (REPORT.to_json(), "first"), (empty, "second"))
    assert (shown["verdict"], shown["summary"], shown["bars"]) == ("second", "", 0)
    assert shown["button"] == "hide details"
    assert not any(shown[part] for part in ("chart", "save", "legend", "details"))
    assert shown["copy"]
    again = showing(view, (empty, "first"), (REPORT.to_json(), "second"))
    assert all(again[part] for part in ("chart", "save", "legend", "details", "copy"))


def test_an_unreadable_document_asks_for_a_reload(view):
    shown = showing(view, (json.dumps({"mxfp8_report": 9}), "summary"))
    assert shown["summary"] == "summary" and "reload the page" in shown["verdict"]
    assert not shown["chart"]


@pytest.mark.parametrize(
    ("document", "text", "level", "verdict"),
    [
        ({"mxfp8_report": 1, "verdict": {"level": "notice", "text": "so", "layers": []}}, "a\nb",
         "notice", "so"),
        ({"mxfp8_inspection": 1}, "a\nOK: sound", "good", "OK: sound"),
        ({"mxfp8_inspection": 1}, "a\nNOT OK: 1 problem", "bad", "NOT OK: 1 problem"),
        ({"mxfp8_backend_report": 1}, "a\nb", "", "a"),
    ],
)  # fmt: skip
def test_the_verdict_comes_first_and_the_rest_on_a_click(view, document, text, level, verdict):
    shown = showing(view, (json.dumps({**document, "layers": [asdict(LAYERS[0])]}), text))
    rest = text.removeprefix(verdict).strip()
    assert (shown["level"], shown["verdict"], shown["summary"]) == (level, verdict, rest)
    assert shown["chart"] and shown["closed"]


def test_nothing_changes_the_height_but_opening(view):
    heights = view(
        """async ([text, pixel]) => {
            const { ReportView } = await import("/extensions/ComfyUI-MXFP8/report.mjs");
            const view = new ReportView();
            document.body.append(view.element);
            const seen = [];
            const measure = () => seen.push(view.element.offsetHeight);
            measure();
            view.progress("working\\n".repeat(9)); measure();
            const image = { name: "seed 1", first: pixel, second: pixel };
            view.show(text, "line\\n".repeat(40), [image, image], ["BF16", "MXFP8"]); measure();
            view.part("[name=open]").click(); measure();
            const top = () => view.part(".summary").getBoundingClientRect().top;
            const tops = [top()];
            for (const index of [0, 1, 2, 3]) { view._choose(index); tops.push(top()); }
            measure();
            view.part("[name=open]").click(); measure();
            view.element.remove();
            return [seen, new Set(tops).size];
        }""",
        [REPORT.to_json(), PIXEL],
    )
    (new, working, shown, opened, chosen, closed), tops = heights
    assert new == working == shown == closed < opened == chosen
    assert tops == 1  # whichever bar is under the pointer


# Values that stand in lines, by name; any other is a name, in angle brackets.
VALUES = {
    **dict.fromkeys(("after", "before", "saved", "size", "speed"), "6.40 GB"),
    **dict.fromkeys(("count", "first", "last", "measured", "others", "steps"), "7"),
    **dict.fromkeys(("low", "percent", "ratio", "sqnr", "worst"), "0.5"),
    **dict.fromkeys(("data", "rows", "seeds", "what", "who", "word"), "linear layer"),
    "dtype": "F16", "expression": "'(A|B); \\'\"'", "layers": "7", "option": "EXCLUDE",
    "preset": "NONE", "time": "2",
}  # fmt: skip


def upper(view, texts: list[str], lines: list[str]) -> list[str]:
    """What becomes of lines in a language that has the texts in capitals."""
    made, english = view(
        """async ([texts, lines]) => {
            const language = await import("/extensions/ComfyUI-MXFP8/language.mjs");
            const table = Object.fromEntries(texts.map((text) => [text, text.toUpperCase()
                .replace(/\\[\\w+\\]/g, (name) => name.toLowerCase())]));
            language.translateWith(() => table);
            const made = lines.map(language.translated);
            language.translateWith(() => undefined);
            return [made, lines.map(language.translated)];
        }""",
        [texts, lines],
    )
    assert english == lines
    return made


def test_lines_of_the_server_are_recognized_by_their_words(view):
    """Every text that has any, with values in it; also in a part of a line, or several lines."""
    every = list(translations.view_texts().values())
    texts = [x for x in every if re.search(r"\w\w", NAMES.sub("", x))]
    lines = [NAMES.sub(lambda name: VALUES.get(name[1], f"<{name[1]}>"), x) for x in texts]
    lines += ["empty; linear layer; 0.5 GB of memory", "linear layer\nlinear layer"]
    made = upper(view, texts, lines)
    assert [re.sub("<\\w+>", lambda name: name[0].upper(), x) for x in made] == [
        x.upper() for x in lines
    ]
    assert all(name in text for text in made for name in re.findall("<\\w+>", text.lower()))


@pytest.mark.parametrize(
    ("line", "made"),
    [
        ("marked as MXFP9", None),
        ("marked as MXFP8", "MARKED AS MXFP8"),
        ("a.safetensors: failed: out of memory; close other programs", None),
        ("NOT OK: 3 problems; do not use this file", None),
        ("This file keeps every layer", None),
        ("this file keeps 'a'", None),
        ("preset zimage keeps 'linear layer; a'", "PRESET zimage KEEPS 'linear layer; a'"),
        ("excluded by 'a; linear layer'", "EXCLUDED BY 'a; linear layer'"),
        ("excluded by \"'; 'linear layer\"", "EXCLUDED BY \"'; 'linear layer\""),
        ("excluded by a; linear layer", None),
        ("one sentence; linear layer", None),
        ("WARNING: one sentence; another", "WARNING: one sentence; another"),
        ("WARNING: linear layer", "WARNING: LINEAR LAYER"),
        ("SQNR 31 dB; worst layer empty: 30 dB", "SQNR 31 DB; WORST LAYER empty: 30 DB"),
    ],
)
def test_other_sentences_and_names_stay_as_they_are(view, line, made):
    assert upper(view, list(translations.view_texts().values()), [line]) == [made or line]


@pytest.mark.parametrize("repeated", ["a -> b, 3% of the size, in ", "seeds 1 to "])
def test_long_lines_do_not_hold_up_the_page(view, repeated):
    """A workflow from anywhere brings expressions, and reasons have them whole."""
    texts = list(translations.view_texts().values())
    start = time.perf_counter()
    for length in (300, 12_000):
        line = (repeated * length)[:length]
        upper(view, texts, [line, f"{line}; x", f"excluded by '{line}; '"])
    assert time.perf_counter() - start < 5  # a minute without a limit


PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY"
    "42YAAAAASUVORK5CYII="
)


def test_images_share_a_slider_and_a_click_enlarges_one(view):
    states = view(
        """async (pixel) => {
            const { Pairs } = await import("/extensions/ComfyUI-MXFP8/pairs.mjs");
            const pairs = new Pairs();
            document.body.append(pairs.element);
            const image = (i) => ({ name: `seed ${i}`, first: pixel, second: pixel });
            pairs.show([0, 1, 2].map(image), ["BF16", "MXFP8"]);
            const [first, second] = pairs.element.children;
            const state = () => [pairs.element.style.getPropertyValue("--split"),
                [...pairs.element.children].map((f) => f.ariaValueNow),
                pairs.element.style.getPropertyValue("--columns"),
                pairs.element.classList.contains("one")];
            const states = [state()];
            const key = (name) => first.dispatchEvent(new KeyboardEvent("keydown", { key: name }));
            key("ArrowLeft"); states.push(state());
            second.click(); states.push(state());
            second.click(); states.push(state());
            states.push([first.textContent, first.ariaLabel]);
            pairs.show([], ["", ""]); states.push(pairs.element.hidden);
            pairs.element.remove();
            return states;
        }""",
        PIXEL,
    )
    assert states == [
        ["50%", ["50"] * 3, "2", False],
        ["45%", ["45"] * 3, "2", False],
        ["45%", ["45"] * 3, "1", True],
        ["45%", ["45"] * 3, "2", False],
        ["BF16MXFP8seed 0", "seed 0: BF16 at the left, MXFP8 at the right"],
        True,
    ]


_PREFIX = r"^((diffusion_)?model\.|net\.|core\.)*"


@pytest.mark.parametrize(
    ("present", "whole"),
    [("", rf"{_PREFIX}(a\.1|b\+x)\.weight$"), ("t_in", rf"t_in|{_PREFIX}(a\.1|b\+x)\.weight$")],
)
def test_layers_become_an_expression_for_exclude(view, present, whole):
    made = view("(present) => documents.excluding(['a.1', 'b+x'], present)", present)
    assert made == whole
    for prefix in PREFIXES:
        assert re.search(made, f"{prefix}a.1.weight"), prefix
    for other in ("a.10", "10.a.1", "blocks.0.a.1"):
        assert not re.search(made, f"{other}.weight")


def test_steps_and_seeds_have_no_sizes_to_sort_by(view):
    text = json.dumps({"mxfp8_comparison": 1, "steps": [{"step": 1, "divergence": 1e-3}]})
    assert showing(view, (text, ""))["orders"] == ["in order", "worst first"]


def test_hostile_names_are_text(view):
    layer = {**asdict(LAYERS[0]), "name": "<img src=x onerror=alert(1)>"}
    text = json.dumps({"mxfp8_report": 1, "layers": [layer]})
    shown = showing(view, (text, "<b>summary</b>"))
    assert shown["made"] == 0
    assert shown["name"] == layer["name"] and shown["verdict"] == "<b>summary</b>"
