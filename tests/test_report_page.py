"""The report's page: every number is the record's, nothing is fetched, nothing in the record becomes markup; a browser shows it."""

import math
import os
import re
import statistics
import struct
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import pytest
from report_sample import many_layers, sample

from twofour.errors import InputError
from twofour.report import page, units
from twofour.report.page import render, write_page
from twofour.report.record import Report

VOID = {"meta", "link", "wbr", "br", "input", "img", "hr"}
# What the page itself says that has digits in it.
FIXED_WORDS = r"2:4|p50|p90|p99|p10|schema"
# A unit's factor from the record's value to the text; percent stands for a share or for a metric that is in percent already.
SCALES = {
    "": (1.0,),
    "%": (1.0, 100.0),
    "points": (1.0,),
    "B": (1.0,),
    "kB": (1e-3,),
    "MB": (1e-6,),
    "GB": (1e-9,),
    "FLOP": (1.0,),
    "kFLOP": (1e-3,),
    "MFLOP": (1e-6,),
    "GFLOP": (1e-9,),
    "ms": (1.0,),
    "s": (1.0,),
}


@dataclass
class Page(HTMLParser):
    """A page taken apart: numbers with their values, text outside them, tables, elements."""

    numbers: list[tuple[float, str]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    chart_words: list[str] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)
    value: str | None = None

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "data":
            self.value = dict(attrs)["value"]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag, f"</{tag}> closes another element"
        if tag == "data":
            self.value = None

    def handle_data(self, text: str) -> None:
        if {"script", "style"} & set(self.stack):
            return
        if "svg" in self.stack:
            self.chart_words.append(text)
            return
        text = text.replace("\u00a0", " ")
        if self.tables and {"td", "th"} & set(self.stack):
            self.tables[-1][-1][-1] += text
        if self.value is not None:
            self.numbers.append((float(self.value), text))
        elif text.strip():
            self.words.append(text)


def taken_apart(text: str) -> Page:
    parsed = Page()
    parsed.feed(text)
    parsed.close()
    assert parsed.stack == []
    return parsed


def numbers_in(value: Any) -> set[float]:
    """Every number anywhere in a JSON value, and the length of every list."""
    if isinstance(value, bool):
        return set()
    if isinstance(value, int | float):
        return {float(value)}
    if isinstance(value, dict):
        return set().union(*map(numbers_in, value.values()), set())
    if isinstance(value, list):
        return set().union({float(len(value))}, *map(numbers_in, value))
    return set()


def strings_in(value: Any) -> set[str]:
    if isinstance(value, str):
        return {value}
    if isinstance(value, dict):
        return set(value) | set().union(*map(strings_in, value.values()), set())
    if isinstance(value, list):
        return set().union(*map(strings_in, value), set())
    return set()


def derived_numbers(report: Report) -> set[float]:
    """Means, spreads, differences, ratios and sums that the page may show, worked out from the record's plain rows."""
    means = {row.variant: statistics.fmean(row.values) for row in report.accuracy}
    found = set(means.values()) | {statistics.stdev(row.values) for row in report.accuracy if len(row.values) > 1}
    found |= {mean - means["dense"] for mean in means.values()} | {means["2:4"] - means["dense + same training"]}
    pairs: dict[Any, dict[str, list[float]]] = {}
    for speed in report.speed:
        pairs.setdefault((speed.backend, speed.batch), {})[speed.variant] = [speed.p50_ms, speed.p90_ms, speed.p99_ms, speed.items_per_s]
    for memory in report.memory:
        pairs.setdefault(memory.batch, {})[memory.variant] = [memory.peak_bytes]
    for size in report.sizes:
        pairs.setdefault(Path(size.file).suffix, {})[size.variant] = [size.bytes]
    for pair in pairs.values():
        for dense, sparse in zip(pair.get("dense", []), pair.get("2:4", []), strict=False):
            found |= {sparse / dense - 1, dense / sparse}
    sparse_layers = [layer for layer in report.layers if layer.eligible]
    found |= {float(len(sparse_layers)), float(sum(check.passed for check in report.checks)), math.fsum(report.stage_seconds.values())}
    found.add(sum(layer.parameters for layer in sparse_layers) / sum(layer.parameters for layer in report.layers))
    found.add(sum(layer.flops or 0 for layer in sparse_layers) / sum(layer.flops or 0 for layer in report.layers))
    kept = math.fsum((layer.kept_magnitude or 0.0) * layer.parameters for layer in sparse_layers)
    found.add(kept / sum(layer.parameters for layer in sparse_layers))
    return found


def is_rounding(text: str, value: float) -> bool:
    """Whether the text is `value` in its unit, to half of its last digit."""
    match = re.fullmatch(r"[+±−-]?([\d,]+)(?:\.(\d+))?(e[+-]\d+)?(?: (\S+))?", text)
    assert match, f"{text!r} is not a number and a unit"
    whole, decimals, exponent, unit = match.groups()
    power = float(f"1{exponent or 'e0'}")
    shown = float(f"{whole.replace(',', '')}.{decimals or 0}") * power * (-1 if text[0] in "−-" else 1)
    half = 0.5 * 10.0 ** -len(decimals or "") * power
    return any(abs(shown - value * scale) <= half * (1 + 1e-9) for scale in SCALES[unit or ""])


REPORTS = {
    "three seeds": sample(),
    "one seed": sample(seeds=1),
    "200 layers": sample(many_layers(200), epochs=90, failing=True),
    "sparse kernels": sample().model_copy(update={"sparse_kernels": True, "statement": "timed per layer"}),
    "another metric": sample().model_copy(update={"metric": "perplexity", "metric_unit": "", "metric_direction": "lower"}),
}


@pytest.fixture(scope="module", params=REPORTS)
def shown(request: pytest.FixtureRequest) -> tuple[Report, str, Page]:
    report = REPORTS[request.param]
    text = render(report)
    return report, text, taken_apart(text)


def test_every_number_is_the_records_or_follows_from_it(shown: tuple[Report, str, Page]) -> None:
    report, _, parsed = shown
    known = sorted(numbers_in(report.model_dump()) | derived_numbers(report))
    assert len(parsed.numbers) > 80
    for value, text in parsed.numbers:
        assert any(math.isclose(value, other, rel_tol=1e-12, abs_tol=1e-12) for other in known), f"{text!r} = {value} is not in the record"
        assert is_rounding(text, value), f"{text!r} is not {value}"


def test_text_with_digits_outside_numbers_is_the_records(shown: tuple[Report, str, Page]) -> None:
    report, _, parsed = shown
    own = strings_in(report.model_dump()) | {"×".join(map(str, layer.shape)) for layer in report.layers}
    own |= {report.created.replace("T", " "), ", ".join(map(str, report.seeds))}
    own |= {str(value) for _, value in page.flat(report.recipe)} | {name for name, _ in page.flat(report.recipe)}
    pieces = {piece for text in own for piece in [text, *re.findall(r"[^./]*[./]|[^./]+", text)]}
    for text in parsed.words:
        rest = re.sub(FIXED_WORDS, "", text)
        if re.search(r"\d", rest):
            left = text.strip()
            for piece in sorted((p for p in pieces if re.search(r"\d", p)), key=len, reverse=True):
                left = left.replace(piece, "")
            assert not re.search(r"\d", re.sub(FIXED_WORDS, "", left)), f"{text!r} holds a number that is not marked as one"


def test_the_page_needs_nothing_outside_itself(shown: tuple[Report, str, Page]) -> None:
    _, text, parsed = shown
    assert not re.search(r"https?:|@import|\bsrc=|url\((?!#)|fetch\(|XMLHttpRequest", text, re.IGNORECASE)
    for _, attributes in parsed.tags:
        for name in ("href", "xlink:href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith("#") or attributes[name] == "data:,"


def test_ids_are_unique_and_links_lead_to_them(shown: tuple[Report, str, Page]) -> None:
    _, text, parsed = shown
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for _, a in parsed.tags if (a.get("href") or "").startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert targets <= set(ids)


def row_of(parsed: Page, first: str) -> list[str]:
    return next(row for table in parsed.tables for row in table if row[0].startswith(first))


def test_the_tables_hold_the_rows_of_the_record() -> None:
    report = REPORTS["three seeds"]
    parsed = taken_apart(render(report))
    for variant, (label, _) in page.VARIANTS.items():
        values = next(row.values for row in report.accuracy if row.variant == variant)
        rows = [row for table in parsed.tables for row in table if row[0] == "".join(page.VARIANTS[variant])]
        assert len(rows) == 1, label
        assert rows[0][1] == f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"
        assert rows[0][3].split() == [f"{value:.2f}" for value in values]
    assert row_of(parsed, "p99")[1:] == ["0.361 ms", "0.364 ms", "+0.9 %"]
    assert row_of(parsed, ".onnx")[1:] == ["598 kBdense.onnx", "602 kBsparse.onnx", "+0.6 %"]
    assert row_of(parsed, "stage2.conv.weight") == ["stage2.conv.weight", "Conv2d", "64×64×3×3", "36,864", "1.18 MFLOP", "82.7 %", "2:4"]
    assert row_of(parsed, "stem.weight")[5:] == ["–", "dense 1 input channels are not a multiple of 4"]
    assert row_of(parsed, "predictions that differ")[1:] == ["0 of 360", "0 of 360"]


def test_every_layer_has_a_row_and_every_layer_that_ran_a_bar() -> None:
    report = REPORTS["200 layers"]
    parsed = taken_apart(render(report))
    table = next(table for table in parsed.tables if table[0][0] == "Layer")
    assert [row[0] for row in table[1:]] == [layer.name for layer in report.layers]
    ran = [layer for layer in report.layers if layer.flops is not None]
    for width in ("wide", "narrow"):
        bars = [a for _, a in parsed.tags if re.fullmatch(rf"flops-{width}-layer\d+", a.get("id") or "")]
        assert len(bars) == len(ran) == 199
    assert sum(text.startswith("layer1.0.conv1.weight: 236 MFLOP, first convolution") for text in parsed.chart_words) == 2


def test_the_time_is_charted_as_shares_so_that_a_busy_machine_shows_no_gain() -> None:
    """Engines are profiled one after the other: twice the microseconds on one side must not look like a speed-up."""
    report = REPORTS["three seeds"]
    slower = [row.model_copy(update={"microseconds": 2 * row.microseconds}) if row.variant == "dense" else row for row in report.profile]

    def chart(shown: Report) -> list[str]:
        return re.findall(r"<svg[^>]*share of the engine.*?</svg>", render(shown), re.DOTALL)

    assert len(chart(report)) == 2
    assert chart(report) == chart(report.model_copy(update={"profile": slower}))
    conv = sum(row.share for row in report.profile if row.variant == "dense" and row.operation == "Conv")
    assert f">{100 * conv:.1f} %<" in chart(report)[0]


def test_without_sparse_kernels_no_gain_is_claimed() -> None:
    plain, faster = render(REPORTS["three seeds"]), render(REPORTS["sparse kernels"])
    assert f'<p class="statement">{REPORTS["three seeds"].statement}</p>' in plain
    assert "no gain claimed" in plain
    assert "not a gain from sparsity" in plain
    assert "Ratio dense to 2:4" not in plain
    assert "Ratio dense to 2:4" in faster
    assert "no gain claimed" not in faster


def test_a_failed_check_is_shown_as_one() -> None:
    text = render(REPORTS["200 layers"])
    assert text.count("✗ failed") == 1
    assert text.count("✓ passed") == 4
    assert "Do not use these files" in text
    assert "Do not use these files" not in render(REPORTS["three seeds"])


HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</title></style><b>", r"$\frac{1}{$ & {{ 7*7 }}", "a'b`c\\"]


def test_nothing_in_the_record_becomes_markup() -> None:
    layers = [
        row.model_copy(update={"name": name, "reason": name if row.reason else ""})
        for row, name in zip(sample().layers, HOSTILE, strict=False)
    ]
    report = sample(layers).model_copy(
        update={"model": HOSTILE[0], "data": HOSTILE[2], "notes": HOSTILE, "command": HOSTILE[1], "recipe": {HOSTILE[0]: HOSTILE[3]}}
    )
    report = report.model_copy(
        update={"profile": [row.model_copy(update={"operation": HOSTILE[0], "node": HOSTILE[3]}) for row in report.profile]}
    )
    parsed = taken_apart(render(report))
    tags = [tag for tag, _ in parsed.tags]
    assert (tags.count("script"), tags.count("style"), tags.count("img"), tags.count("b")) == (1, 1, 0, 0)
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    table = next(table for table in parsed.tables if table[0][0] == "Layer")
    assert [row[0] for row in table[1:]] == HOSTILE
    assert HOSTILE[3] in "".join(parsed.chart_words)


def test_what_was_not_recorded_is_said_to_be_missing() -> None:
    lists = ("accuracy", "training", "layers", "checks", "speed", "memory", "sizes", "profile", "agreement", "notes")
    empty: dict[str, Any] = {name: [] for name in lists}
    text = render(sample().model_copy(update={**empty, "stage_seconds": {}, "recipe": {}}))
    taken_apart(text)
    for sentence in ("No accuracy was recorded.", "No check was recorded.", "Speed was not measured.", "The engines were not profiled."):
        assert sentence in text
    assert "<svg" not in text


def test_a_missing_partner_leaves_a_dash_and_no_difference() -> None:
    report = sample()
    parsed = taken_apart(render(report.model_copy(update={"speed": [row for row in report.speed if row.variant == "dense"]})))
    assert row_of(parsed, "p50")[1:] == ["0.254 ms", "–", "–"]


def test_a_loss_that_is_not_finite_still_gives_a_page() -> None:
    report = sample(seeds=1, epochs=1)
    rows = [row.model_copy(update={"epochs": [row.epochs[0].model_copy(update={"loss": math.nan})]}) for row in report.training]
    text = render(report.model_copy(update={"training": rows}))
    taken_apart(text)
    assert report.statement in text
    assert "<svg" in text


def test_the_same_record_gives_the_same_page() -> None:
    assert render(sample()) == render(sample())


def test_charts_leave_the_users_matplotlib_settings_alone() -> None:
    import matplotlib

    before = {"font.size": 31.0, "svg.fonttype": "path"}
    with matplotlib.rc_context(before):
        assert render(sample()) == render(sample())
        assert {key: matplotlib.rcParams[key] for key in before} == before
        styled = render(sample())
    assert styled == render(sample())


def test_writing_replaces_the_file_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    write_page(sample(seeds=1), target)
    before = target.read_text(encoding="utf-8")
    assert before == render(sample(seeds=1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="cannot be written: No space left on device"):
        write_page(sample(), target)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert target.read_text(encoding="utf-8") == before


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_are_readable_in_light_dark_and_print() -> None:
    """Source: WCAG 2.2, 1.4.3 (text, 4.5 : 1) and 1.4.11 (graphics, 3 : 1)."""
    blocks = re.findall(r":root \{(.*?)\}", render(sample()), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for ground in ("paper", "card", "wash"):
            for name, least in {"ink": 7, "muted": 4.5, "sparse": 4.5, "control": 4.5, "bad": 4.5, "dense": 3}.items():
                light, dark = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= least, (name, ground, block)


PROBE = """
const table = document.getElementById("layer-table");
const order = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
const search = (text) => {
  const input = document.querySelector(".tools input");
  input.value = text;
  input.dispatchEvent(new Event("input"));
  const rows = [...table.tBodies[0].rows].filter((row) => getComputedStyle(row).display !== "none");
  return [rows.length, document.querySelector(".tools output").textContent];
};
const probe = () => ({
  overflow: document.documentElement.scrollWidth - innerWidth,
  charts: [...document.querySelectorAll(".chart")].filter((c) => getComputedStyle(c).display !== "none").map((c) => c.className),
  sorted: [...table.tHead.rows[0].cells].map((head) => {
    const states = [];
    for (let turn = 0; turn < 2; turn++) {
      head.querySelector("button").click();
      states.push([head.getAttribute("aria-sort"), order()]);
    }
    return states;
  }),
  found: ["", "depthwise", "embedding 30522", "no such layer"].map(search),
});
"""


def test_a_browser_sorts_and_searches_the_layers_and_nothing_overflows(tmp_path: Path) -> None:
    report = REPORTS["200 layers"]
    seen: Any = browser.evaluate(render(report), PROBE, (390, 1440), tmp_path)
    assert set(seen) == {390, 1440}
    assert [seen[width]["overflow"] for width in (390, 1440)] == [0, 0]
    assert set(seen[390]["charts"]) == {"chart narrow"}
    assert set(seen[1440]["charts"]) == {"chart wide"}
    columns: list[tuple[int, Any]] = [(3, lambda x: x.parameters), (4, lambda x: x.flops), (5, lambda x: x.kept_magnitude)]
    by_name = {layer.name: layer for layer in report.layers}
    for column, value in columns:
        for state, names in seen[1440]["sorted"][column]:
            values = [value(by_name[name]) for name in names]
            known = [v for v in values if v is not None]
            assert known == sorted(known, reverse=state == "descending"), state
            assert len(known) == sum(value(layer) is not None for layer in report.layers)
            assert None not in values[: len(known)], "unknown values come last both ways"
        assert [state for state, _ in seen[1440]["sorted"][column]] == ["descending", "ascending"]
    up, down = (names for _, names in seen[1440]["sorted"][0])
    assert up == sorted(by_name, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])
    assert down == up[::-1]
    reasons = sum("depthwise" in layer.reason for layer in report.layers)
    assert seen[1440]["found"] == [
        [200, "200 of 200 layers"],
        [reasons, f"{reasons} of 200 layers"],
        [1, "1 of 200 layers"],
        [0, "0 of 200 layers"],
    ]


@pytest.mark.parametrize(
    ("width", "flags"), [(390, ()), (1440, ("--blink-settings=preferredColorScheme=0",))], ids=["phone, light", "desktop, dark"]
)
def test_a_screenshot_shows_the_page(tmp_path: Path, width: int, flags: tuple[str, ...]) -> None:
    from matplotlib.image import imread

    write_page(sample(), tmp_path / "report.html")
    browser.screenshot(tmp_path / "report.html", tmp_path / "report.png", width, 1200, *flags)
    data = (tmp_path / "report.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (width, 1200)
    pixels = imread(tmp_path / "report.png")
    background = pixels[2, 2, :3]
    assert (background.mean() < 0.2) == bool(flags), "the corner shows the colour scheme asked for"
    changed = (abs(pixels[..., :3] - background).max(axis=-1) > 0.05).mean(axis=1)
    assert (changed[:1150].reshape(-1, 115).max(axis=1) > 0).all(), "something is drawn in every tenth of the height"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00256, "0.00256"),
        (0.99951, "1.00"),
        (9.8741, "9.87"),
        (99.96, "100"),
        (123.4, "123"),
        (12345.6, "12,346"),
        (math.nan, "–"),
    ],
)
def test_significant_keeps_three_digits_and_every_integer_digit(value: float, text: str) -> None:
    assert units.significant(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.34, "+0.3"), (-0.34, "−0.3"), (0.04, "±0.0"), (-0.04, "±0.0"), (1234.5, "+1,234.5"), (math.inf, "–")]
)
def test_signed_shows_the_sign_or_that_there_is_none(value: float, text: str) -> None:
    assert units.signed(value, 1) == text


@pytest.mark.parametrize(
    ("value", "text"), [(999, "999 B"), (1000, "1.00 kB"), (612_344, "612 kB"), (31_457_280, "31.5 MB"), (25e9, "25.0 GB")]
)
def test_sizes_are_decimal(value: float, text: str) -> None:
    assert units.bytes_text(value) == text


def comparison(tmp_path: Path, *reports: Report) -> str:
    from twofour.report.compare import load_runs, write_comparison

    folders = []
    for index, report in enumerate(reports):
        folder = tmp_path / f"run{index}" / "out"
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(report.model_dump_json())
        folders.append(folder)
    write_comparison(load_runs(folders), tmp_path / "comparison.html")
    return (tmp_path / "comparison.html").read_text(encoding="utf-8")


def test_a_comparison_holds_the_numbers_of_every_run_and_what_was_different(tmp_path: Path) -> None:
    first = sample()
    second = sample(many_layers(200), seeds=1).model_copy(update={"method": "wanda", "recipe": {**first.recipe, "epochs": 90}})
    parsed = taken_apart(comparison(tmp_path, first, second))
    outcome, differs, kept = parsed.tables
    assert [row[0].split()[0] for row in outcome[1:]] == ["run0/outdemo", "run1/outdemo"]
    for report in (first, second):
        values = {value for value, _ in parsed.numbers}
        sparse, control = report.accuracy_of("2:4"), report.accuracy_of("dense + same training")
        assert {sparse.mean, report.accuracy_of("dense").mean, sparse.mean - control.mean} <= values
        assert {layer.kept_magnitude for layer in report.layers if layer.kept_magnitude is not None} <= values
    assert differs[1:] == [["seeds", "0, 1, 2", "0"], ["method", "magnitude", "wanda"], ["recipe.epochs", "12", "90"]]
    assert len(kept) - 1 == sum(layer.kept_magnitude is not None for report in (first, second) for layer in report.layers)
    assert "different numbers of seeds" in " ".join(parsed.words)
    assert not [tag for tag, attributes in parsed.tags if attributes.get("src") or (attributes.get("href") or "#")[0] not in "#d"]


def test_a_comparison_says_what_is_not_comparable_and_names_are_never_markup(tmp_path: Path) -> None:
    first = sample()
    other = sample(failing=True).model_copy(
        update={
            "data": "imagefolder:<b>x</b>",
            "environment": first.environment.model_copy(update={"cpu": "<script>alert(1)</script>"}),
            "accuracy": [],
            "speed": [],
            "sizes": [],
        }
    )
    text = comparison(tmp_path, first, other)
    words = " ".join(taken_apart(text).words)
    assert "accuracies are not comparable" in words
    assert "latencies are not comparable" in words
    assert "<b>" not in text
    assert text.count("<script>") == 1
    same = comparison(tmp_path / "same", first, first.model_copy(update={"created": "later"}))
    assert "Nothing that the reports record." in same


def test_a_comparison_of_different_metrics_gives_each_run_its_unit_and_fits_its_frame(tmp_path: Path) -> None:
    first = sample()
    scale = [row.model_copy(update={"mean": row.mean / 1e4, "values": [v / 1e4 for v in row.values]}) for row in first.accuracy]
    error = first.model_copy(
        update={
            "model": "torchvision:mobilenet_v2",
            "data": "imagefolder@32:pictures",
            "metric": "squared error",
            "metric_unit": "",
            "metric_direction": "lower",
            "accuracy": scale,
        }
    )
    text = comparison(tmp_path, first, error)
    outcome = taken_apart(text).tables[0]
    dense = first.accuracy_of("dense").mean
    assert outcome[1][2].startswith(f"{dense:.2f} %")
    assert outcome[2][2].startswith(f"{dense / 1e4:.6f}")
    script = "const probe = () => Math.max(...[...document.querySelectorAll('.frame')].map(f => f.scrollWidth - f.clientWidth))"
    assert browser.evaluate(text, script, (1200,), tmp_path) == {1200: 0}


def test_a_comparison_needs_two_runs_each_once(tmp_path: Path) -> None:
    from twofour.report.compare import load_runs, write_comparison

    (tmp_path / "report.json").write_text(sample().model_dump_json())
    with pytest.raises(InputError, match="1 run to compare, expected at least two"):
        write_comparison(load_runs([tmp_path]), tmp_path / "c.html")
    with pytest.raises(InputError, match="is given twice, expected each run once"):
        load_runs([tmp_path, tmp_path / "report.json"])
    with pytest.raises(InputError, match=r"report '.*none' does not exist"):
        load_runs([tmp_path / "none"])


def test_a_comparison_fits_a_phone(tmp_path: Path) -> None:
    text = comparison(tmp_path, sample(), sample(many_layers(60)))
    script = "const probe = () => document.documentElement.scrollWidth - innerWidth"
    assert all(int(str(over)) <= 0 for over in browser.evaluate(text, script, (360, 1200), tmp_path).values())
