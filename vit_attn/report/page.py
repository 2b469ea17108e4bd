"""The page of a comparison: which blocks, in which order, and as HTML or Markdown."""

import base64
import io
import re
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from PIL import Image

import vit_attn
from vit_attn.report.blocks import Block, Code, Details, Items, Page, Picture, Section, Text
from vit_attn.report.compare import Comparison, Group
from vit_attn.report.figures import accuracy_figure, cost_figure, gain_figure
from vit_attn.report.figures_alpha import alpha_figure, alpha_training_figure
from vit_attn.report.figures_common import BREAKS, Drawing, group_styles, score_key
from vit_attn.report.figures_explain import faithfulness_figure, pictures
from vit_attn.report.figures_training import curves_figure, layers_figure, reach_figure
from vit_attn.report.summary import Row
from vit_attn.report.tables import (
    agreement_table,
    cost_table,
    environment_table,
    held_fixed_tables,
    left_out_table,
    plain_value,
    scores_table,
)
from vit_attn.report.words import answer

_FIGURES = {
    "scores": (accuracy_figure,),
    "cost": (cost_figure,),
    "training": (curves_figure, layers_figure, reach_figure),
    "faithfulness": (faithfulness_figure,),
    "zeros": (gain_figure, alpha_figure, alpha_training_figure),
}
_CSS_PIXELS = 96  # per inch


def draw(comparison: Comparison, rows: Sequence[Row]) -> dict[str, list[Drawing]]:
    """Draw every figure for which there are numbers, by the section that shows it."""
    styles = group_styles(comparison)
    drawn = {
        section: [drawing for make in makers if (drawing := make(comparison, rows, styles)) is not None]
        for section, makers in _FIGURES.items()
    }
    return {**drawn, "pictures": pictures(comparison, rows)}


def build_page(
    comparison: Comparison, rows: Sequence[Row], drawn: dict[str, list[Drawing]], files: dict[str, Path]
) -> Page:
    """Put the report together.

    Args:
        drawn: what :func:`draw` returns.
        files: name of a drawing → its PNG.
    """

    def figures(section: str) -> list[Block]:
        return [_picture(drawing, files[drawing.name]) for drawing in drawn[section]]

    def filled(*blocks: Block | None) -> list[Block]:
        return [block for block in blocks if block is not None]

    sections = [
        ("answer", "Answer", _answer(comparison, rows)),
        ("warnings", "Warnings and runs left out", _warnings(comparison)),
        ("compared", "What was compared", _compared(comparison, rows)),
        ("scores", "Scores", [scores_table(comparison, rows), *figures("scores")]),
        ("cost", "Cost", [*filled(cost_table(comparison, rows)), *figures("cost")]),
        ("training", "Training and attention", figures("training")),
        ("pictures", "Where they look", figures("pictures")),
        (
            "faithfulness",
            "Can the explanations be trusted?",
            [*figures("faithfulness"), *filled(agreement_table(comparison, rows))],
        ),
        ("zeros", "Sparsity and α", figures("zeros")),
        ("reproduce", "Reproduce", _reproduce(comparison, rows)),
    ]
    seeds = ", ".join(map(str, comparison.seeds)) or "unknown"
    runs = sum(len(row.group.runs) for row in rows)
    return Page(
        f"Which attention? {comparison.name}".strip(),
        f"{_count(runs, 'finished run')} of {_count(len(rows), 'mechanism')}, seeds {seeds}. Written "
        f"{datetime.now():%Y-%m-%d %H:%M} by vit_attn {vit_attn.__version__}.",
        tuple(Section(anchor, title, tuple(blocks)) for anchor, title, blocks in sections if blocks),
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _picture(drawing: Drawing, path: Path) -> Picture:
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        width, height = (round(pixels * _CSS_PIXELS / drawing.figure.dpi) for pixels in image.size)
    return Picture(
        name=drawing.name,
        title=drawing.title,
        caption=drawing.caption,
        alt=drawing.alt,
        base64=base64.b64encode(content).decode(),
        width=width,
        height=height,
    )


def _answer(comparison: Comparison, rows: Sequence[Row]) -> list[Block]:
    first, *more = answer(comparison, rows)
    blocks: list[Block] = [Text(first, lead=True), *map(Text, more)]
    if comparison.warnings:
        many = f"{len(comparison.warnings)} warnings" if len(comparison.warnings) > 1 else "warning"
        blocks.append(Text(f"Read this with the {many} below."))
    return blocks


def _warnings(comparison: Comparison) -> list[Block]:
    table = left_out_table(comparison)
    return [
        Items(comparison.warnings, warning=True) if comparison.warnings else Text("No warnings."),
        table if table is not None else Text("Runs left out: none."),
    ]


def _compared(comparison: Comparison, rows: Sequence[Row]) -> list[Block]:
    main, rest = held_fixed_tables(comparison)
    varied = ", ".join(comparison.varied) or "nothing"
    blocks: list[Block] = [
        Text(
            f"A mechanism's line averages runs that differ in nothing but the seed. The lines differ in: {varied}. "
            f"The baseline is {comparison.baseline}."
        ),
        Text(_protocol(comparison, rows)),
    ]
    blocks += [main] if main.rows else []
    if rest is not None:
        blocks.append(Details(f"{len(rest.rows)} more settings that all runs share", (rest,)))
    return blocks


def _protocol(comparison: Comparison, rows: Sequence[Row]) -> str:
    """Say where validation comes from and how often the test images were looked at."""
    share = comparison.held_fixed.get("data.val_fraction")
    part = f"{100 * share:g} % of" if isinstance(share, (int, float)) else "a share of"
    text = (
        f"Validation is {part} the training images, per class, the same ones for every seed (data.split_seed), unless "
        "the data bring a validation set of their own. "
    )
    runs = [run for row in rows for run in row.group.runs]
    if score_key(rows) == "val/acc":
        return text + (
            "No run was scored on test images. The numbers are those of the validation images by which the checkpoint "
            "was chosen, and so are too high for all mechanisms."
        )
    text += (
        "The test images are scored once, after training, with the checkpoint that was best on validation; nothing "
        "was chosen by them."
    )
    other = [run.name for run in runs if (run.results or {}).get("checkpoint") not in (None, "best.ckpt")]
    if other:
        text += f" Except for {', '.join(other)}: scored with another checkpoint."
    return text


def _reproduce(comparison: Comparison, rows: Sequence[Row]) -> list[Block]:
    table = environment_table(rows)
    return [
        Text(
            "The command lines, as far as a run records them; what else was changed on the command line is "
            "in the config.yaml of every run's folder, everything resolved."
        ),
        Code("\n".join(command_line(row.group) for row in rows)),
        *([table] if table is not None else []),
    ]


def command_line(group: Group) -> str:
    """The train.py command that runs a group's seeds."""
    run = group.runs[0]
    name = str(run.config.get("experiment_name", "default"))
    recipe = Path(vit_attn.__file__).parent.parent / "conf" / "experiment" / f"{name}.yaml"
    overrides: dict[str, Any] = (
        {} if name == "default" else {"experiment" if recipe.is_file() else "experiment_name": name}
    )
    model = run.config.get("model")
    overrides["model.attention"] = model["attention"] if isinstance(model, dict) else group.attention
    overrides |= {f"model.attention_options.{key}": value for key, value in group.options.items()}
    overrides |= group.differences
    seeds = [str(run.seed) for run in group.runs if run.seed is not None]
    arguments = [f"{key}={plain_value(value)}" for key, value in overrides.items()]
    arguments += [f"seed={','.join(seeds)}"] if seeds else []
    return shlex.join(["python", "train.py", *(["-m"] if len(seeds) > 1 else []), *arguments])


# What Markdown, its tables or its formulas would take for their own.
_MARKDOWN = re.compile(r"([\\`*\[\]|$~]|(?<!\w)_|_(?!\w)|^[#>+-](?=\s))")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def escape_markdown(text: object) -> str:
    """Make text mean itself in Markdown, in a paragraph or in a table's cell."""
    line = " ".join(str(text).split())
    escaped = _MARKDOWN.sub(r"\\\1", line)
    return re.sub("[&<>]", lambda match: _ENTITIES[match[0]], escaped)


def fenced(text: str) -> str:
    """Put text between fences longer than any in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}bash\n{text}\n{fence}"


def _breakable(text: str) -> Markup:
    """Escape a label for HTML, and let it break where its parts meet: "entmax15+" "strided"."""
    return Markup("<wbr>").join(escape(part) for part in re.split(BREAKS, text))


def render(page: Page, template: str) -> str:
    """Fill a template of this package: "report.html" or "report.md"."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vit_attn.report"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=False,
    )
    environment.filters |= {"md": escape_markdown, "fenced": fenced, "breakable": _breakable}
    return environment.get_template(f"{template}.j2").render(page=page)
