"""The report's page: valid, self-contained, escaped, and its numbers are those of the runs."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy import stats

from vit_attn.report.blocks import Cell, Code, Details, Header, Items, Page, Picture, Section, Table, Text
from vit_attn.report.page import command_line, draw, escape_markdown, render
from vit_attn.report.tables import plain_value, scores_table
from vit_attn.report.words import answer
from vit_attn.report.write import load, write, write_report

NASTY = "a$b <i>x</i> & c|d *e* `f` [g](h)"
VOID = {"meta", "link", "img", "wbr"}


class Reader(HTMLParser):
    """Checks that every tag is closed in order, and collects texts, attributes and ids."""

    def __init__(self, page):
        super().__init__()
        self.goes_on = False
        self.open, self.tags, self.texts, self.ids = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if "id" in dict(attrs):
            self.ids.append(dict(attrs)["id"])
        if tag not in VOID:
            self.open.append(tag)
        self.goes_on = tag == "wbr"  # in the middle of a text

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.goes_on:
            self.texts[-1] += data
        elif data.strip() and self.open[-1] != "style":
            self.texts.append(data.strip())
        self.goes_on = False


def tables(markdown):
    """Runs of lines that begin with a pipe."""
    return [block.strip().splitlines() for block in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)]


def cells(line):
    return re.split(r"(?<!\\)\|", line.strip())[1:-1]


def check(path):
    """What holds for every report; returns the HTML's reader and the Markdown."""
    page, markdown = path.read_text(), path.with_name("report.md").read_text()
    reader = Reader(page)
    assert page.startswith("<!DOCTYPE html>")
    assert ("html", {"lang": "en"}) in reader.tags
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", page)
    assert "script" not in {tag for tag, _ in reader.tags}
    assert len(set(reader.ids)) == len(reader.ids)
    links = [attributes["href"] for tag, attributes in reader.tags if tag == "a"]
    assert {link.removeprefix("#") for link in links} <= set(reader.ids)
    for tag, attributes in reader.tags:
        if tag == "img":
            assert attributes["src"].startswith("data:image/png;base64,")
            assert attributes["alt"]
    for table in tables(markdown):
        assert len({len(cells(line)) for line in table}) == 1
        assert re.fullmatch(r"\|(:?-+:?\|)+", table[1])
    for picture in re.findall(r"\]\((figures/.*?)\)$", markdown, re.MULTILINE):
        assert (path.parent / picture).is_file()
    return reader, markdown


SCORES = {"softmax": (0.90, 0.92, 0.91, 0.93), "strided": (0.95, 0.965, 0.94, 0.975), "fixed": (0.91, 0.90, 0.93, 0.92)}


@pytest.fixture(scope="module")
def report(run_writer, tmp_path_factory):
    """A report of three mechanisms by four seeds, beside runs that did not finish; its path, rows and comparison."""
    folder = tmp_path_factory.mktemp("runs") / "experiment"
    for attention, scores in SCORES.items():
        for seed, acc in enumerate(scores, start=1):
            run_writer(folder, attention=attention, seed=seed, acc=acc, explain=True)
    run_writer(folder, attention="strided", seed=5, state="running", stopped_after=20, run_name="stopped")
    run_writer(folder, attention="strided", seed=6, state="failed", error=f"loss is NaN: {NASTY}", run_name="broken")
    return write_report([folder])


def row_of(markdown, heading, name):
    (table,) = [table for table in tables(markdown) if heading in table[0]]
    (line,) = [line for line in table if re.match(rf"\| {re.escape(name)}( \(baseline\))? \|", line)]
    return [cell.strip() for cell in cells(line)]


def test_page_is_valid_and_complete(report):
    reader, markdown = check(report)
    headings = re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    assert headings == [
        *("Answer", "Warnings and runs left out", "What was compared", "Scores", "Cost", "Training and attention"),
        *("Where they look", "Can the explanations be trusted?", "Sparsity and α", "Reproduce"),
    ]
    figures = {id.removeprefix("figure-") for id in reader.ids if id.startswith("figure-")}
    assert figures == {path.stem for path in (report.parent / "figures").glob("*.png")}
    assert figures >= {"accuracy", "cost", "curves", "layers", "faithfulness", "zeros", "pictures_gradcam"}


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_those_of_the_runs(report, name):
    values = np.array(SCORES[name])
    cells = row_of(check(report)[1], "verdict", name)
    score = cells[2]
    numbers = [float(number) for number in re.findall(r"\d+\.\d+", score)]
    low, high = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    assert cells[1] == "4"
    assert numbers == pytest.approx([100 * x for x in (values.mean(), values.std(ddof=1), low, high)], abs=0.051)
    assert ("★" in score) == (name == "strided")


def test_verdicts_are_those_of_paired_tests_with_holms_correction(report):
    _, markdown = check(report)
    p = {name: stats.ttest_rel(SCORES[name], SCORES["softmax"]).pvalue for name in ("strided", "fixed")}
    assert p["strided"] < p["fixed"]
    expected = {"strided": 2 * p["strided"], "fixed": max(2 * p["strided"], p["fixed"])}
    verdicts = {"strided": "**better**", "fixed": "cannot tell"}
    for name, adjusted in expected.items():
        difference, shown, verdict = row_of(markdown, "verdict", name)[-3:]
        assert float(difference.split(" ")[0].replace("−", "-")) == pytest.approx(
            100 * np.mean(np.subtract(SCORES[name], SCORES["softmax"])), abs=0.006
        )
        assert float(shown) == pytest.approx(adjusted, abs=0.00051 if adjusted < 0.1 else 0.0051)
        assert verdict.split(" (")[0] == verdicts[name]


def test_answer_says_what_differs_and_how_small_a_difference_could_be_seen(report):
    comparison, rows = load([report.parent.parent])
    lead, reach, cost = answer(comparison, rows)
    assert lead.startswith("strided has the highest mean test accuracy")
    assert "Beyond chance better than the baseline softmax" in lead
    assert "Cannot tell: fixed." in lead
    assert "n = 4" in reach
    assert "for 2 comparisons" in reach
    halves = []
    for name in ("strided", "fixed"):
        differences = np.subtract(SCORES[name], SCORES["softmax"])
        halves.append(100 * stats.t.ppf(0.975, 3) * stats.sem(differences))
    assert f"reach {min(halves):.1f} to {max(halves):.1f} points" in reach
    assert "strided takes" in cost


def test_runs_that_did_not_finish_are_listed_and_not_averaged(report):
    reader, markdown = check(report)
    stopped = row_of(markdown, "reason", "stopped")
    assert stopped[3] == "unfinished"
    assert row_of(markdown, "reason", "broken")[4] == "loss is NaN: " + escape_markdown(NASTY)
    assert "loss is NaN: " + NASTY in reader.texts
    assert "<i>x</i>" not in report.read_text()


def test_held_fixed_and_the_commands_are_there(report):
    _, markdown = check(report)
    assert "AdamW · lr 0.002" in row_of(markdown, "settings", "optimizer")[1]
    assert "python train.py -m experiment_name=experiment model.attention=strided seed=1,2,3,4" in markdown


def test_every_block_survives_any_text(tmp_path):
    table = Table(NASTY, (Header(NASTY, NASTY), Header("b")), ((Cell(NASTY, NASTY), Cell("1", strong=True)),), NASTY)
    picture = Picture("name", NASTY, NASTY, NASTY, "AAAA", 10, 10)
    blocks = (Text(NASTY), Items((NASTY,), warning=True), table, picture, Code("a ``` b"), Details(NASTY, (table,)))
    page = Page(NASTY, NASTY, (Section("anchor", NASTY, blocks),))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/name.png").touch()
    for name in ("report.html", "report.md"):
        (tmp_path / name).write_text(render(page, name))
    reader, markdown = check(tmp_path / "report.html")
    assert "i" not in {tag for tag, _ in reader.tags}
    assert NASTY in reader.texts
    assert "````bash\na ``` b\n````" in markdown
    outside = markdown.replace("a ``` b", "").replace("**1**", "")
    assert not re.search(r"(?<!\\)\$|<i>| & ", outside)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b", r"a\|b"),
        ("$x$", r"\$x\$"),
        ("<b> & c", "&lt;b&gt; &amp; c"),
        ("snake_case and _emphasis_", r"snake_case and \_emphasis\_"),
        ("two\nlines", "two lines"),
        ("back\\slash", r"back\\slash"),
        ("# no heading", r"\# no heading"),
    ],
)
def test_markdown_means_itself(text, escaped):
    assert escape_markdown(text) == escaped


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (0.001, "0.001"),
        (1e-8, "1e-08"),
        (["strided", "full"], "[strided,full]"),
        (3, "3"),
    ],
)
def test_values_are_written_as_the_command_line_takes_them(value, text):
    assert plain_value(value) == text


def test_command_line_quotes_and_keeps_what_differs(run_writer, tmp_path):
    for seed in (1, 2):
        run_writer(tmp_path / "e", attention=["strided", "full"], seed=seed, overrides=("optimizer.lr=5e-3",))
        run_writer(tmp_path / "e", attention="entmax", options={"alpha": 1.3}, seed=seed)
    comparison, _ = load([tmp_path / "e"], baseline="entmax α=1.3")
    commands = [command_line(group) for group in comparison.groups]
    start = "python train.py -m experiment_name=e"
    assert commands == [
        f"{start} model.attention=entmax model.attention_options.alpha=1.3 seed=1,2",
        f"{start} 'model.attention=[strided,full]' optimizer.lr=0.005 seed=1,2",
    ]


def test_one_run_alone(run_writer, tmp_path):
    run_writer(tmp_path / "e")
    _, markdown = check(write_report([tmp_path / "e"]))
    assert "Only one mechanism has finished runs: softmax" in markdown
    assert "from one seed" in markdown
    assert "nan" not in markdown


def test_one_seed_each_tests_nothing(run_writer, tmp_path):
    for attention in ("softmax", "strided"):
        run_writer(tmp_path / "e", attention=attention)
    path = write_report([tmp_path / "e"])
    _, markdown = check(path)
    assert "cannot be tested: 1 shared seed" in markdown
    assert "better" not in row_of(markdown, "verdict", "strided")[-1]
    assert "nan" not in markdown.lower()


def test_two_seeds_are_called_a_hint(run_writer, tmp_path):
    for attention, scores in {"softmax": (0.90, 0.91), "strided": (0.95, 0.9601)}.items():
        for seed, acc in enumerate(scores, start=1):
            run_writer(tmp_path / "e", attention=attention, seed=seed, acc=acc)
    lead, reach, *_ = answer(*load([tmp_path / "e"]))
    assert "Beyond chance better" in lead
    assert "take its verdict as a hint" in reach


def test_old_runs_without_speed_statistics_explanations_and_curves(run_writer, tmp_path):
    for attention in ("softmax", "strided"):
        for seed in (1, 2):
            nothing = {"speed": None, "attention_statistics": None, "cost": None, "environment": None}
            run_writer(tmp_path / "e", attention=attention, seed=seed, state=None, curves=False, results=nothing)
    path = write_report([tmp_path / "e"])
    _, markdown = check(path)
    assert {figure.stem for figure in (path.parent / "figures").iterdir()} == {"accuracy"}
    headings = re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    assert headings == ["Answer", "Warnings and runs left out", "What was compared", "Scores", "Reproduce"]


def test_runs_that_were_not_tested_are_compared_on_validation(run_writer, tmp_path):
    for attention in ("softmax", "strided"):
        for seed in (1, 2):
            run_writer(tmp_path / "e", attention=attention, seed=seed, test=False)
    _, markdown = check(write_report([tmp_path / "e"]))
    assert "highest mean validation accuracy" in markdown
    assert "No run was scored on test images." in markdown


def test_twenty_mechanisms(run_writer, tmp_path):
    patterns = ("softmax", "causal", "strided", "fixed", "sliding_window", "dilated_sliding_window")
    for attention in patterns[1:]:
        for window in (2, 4, 8, 16):
            run_writer(tmp_path / "e", attention=attention, options={"window": window, "stride": window})
    run_writer(tmp_path / "e", attention="softmax")
    comparison, rows = load([tmp_path / "e"])
    assert len(rows) >= 17  # causal reads no window
    drawn = draw(comparison, rows)
    assert "Drawn are 8 of" in next(drawing for drawing in drawn["training"] if drawing.name == "curves").caption
    paragraphs = answer(comparison, rows)
    assert max(map(len, paragraphs)) < 700


def test_long_and_strange_labels_stay_whole_in_the_tables(run_writer, tmp_path):
    for attention in ("softmax", "strided"):
        run_writer(tmp_path / "e", attention=attention, seed=1)
        run_writer(tmp_path / "e", attention=attention, seed=2)
    comparison, rows = load([tmp_path / "e"])
    long = f"{NASTY} {'long ' * 30}end"
    group = replace(rows[1].group, label=long)
    comparison = replace(comparison, groups=(comparison.groups[0], group))
    rows = [rows[0], replace(rows[1], group=group)]
    reader, markdown = check(write(comparison, rows, tmp_path / "out"))
    assert long in reader.texts
    assert escape_markdown(long) in markdown
    assert scores_table(comparison, rows).rows[1][0].text == long
