"""Keep the generated parts of the documentation current, build the API reference, and check links.

    python docs/make.py pages            write docs/api.md, and the recipes that docs/recipes.md shows
    python docs/make.py site build/docs  build the API reference with pdoc, and check everything

The check fails when a page is not what `pages` would write, when a public name has no docstring, or when a link in the
pages or in the built reference leads nowhere. Nothing here needs a GPU or the network.
"""

from __future__ import annotations

import html.parser
import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron_fp32

ROOT = Path(__file__).resolve().parent.parent
API = ROOT / "docs" / "api.md"
RECIPES = ROOT / "docs" / "recipes.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]

SECTIONS = {
    "Configuration": ("Fp32Config", "add_fp32_arguments", "fp32_config_from_args"),
    "On a model that your script or framework builds": ("apply_fp32", "pre_wrap_hook", "check_fp32", "keep_in_fp32"),
    "Building and training": ("model_provider", "install_optimizer_repairs"),
    "Results of the output layer in place of logits": (
        "returning",
        "LogprobsRequest",
        "SelectedLogprobsRequest",
        "TopLogprobsRequest",
        "TruncatedLogprobsRequest",
        "WeightedLossRequest",
        "logprobs_processor",
        "Logprobs",
        "SelectedLogprobs",
        "TruncatedLogprobs",
        "WeightedLoss",
    ),
    "Weights of a live model": (
        "WeightStreamer",
        "VllmSink",
        "VllmOptions",
        "SGLangSink",
        "SGLangOptions",
        "HuggingFaceDirectory",
        "TransferError",
    ),
    "Layers": ("Fp32OutputLayer", "to_fp32_output_layer", "Fp32GatedDeltaNet"),
    "Operators on plain tensors": (
        "fp32_logits",
        "linear_logprobs",
        "linear_selected_logprobs",
        "linear_top_logprobs",
        "linear_truncated_logprobs",
        "linear_truncation_thresholds",
        "linear_cross_entropy",
        "weighted_cross_entropy",
        "logprobs_from_logits",
        "linear_distillation",
        "linear_top_k_distillation",
        "Divergence",
        "VocabParallel",
        "LogitsTransform",
    ),
    "Checkpoints": (
        "import_checkpoint",
        "export_checkpoint",
        "quantize_checkpoint",
        "verify_checkpoints",
        "inspect_checkpoint",
        "Fp8Scheme",
        "named_scheme",
        "CheckpointError",
    ),
}
# Modules whose types public functions return, and those that the pages use by name.
MODULES = (
    "apply",
    "optimizer.native_fp32",
    "kept_parameters.keep_in_fp32",
    "models.live",
    "models.provider",
    "models.specs",
    "ops.logprobs.autograd",
    "ops.logprobs.distillation",
    "ops.logprobs.loss",
    "ops.logprobs.selected",
    "ops.logprobs.top_k_distillation",
    "ops.logprobs.truncated",
    "ops.logprobs.weighted",
    "output_layer.cross_entropy",
    "output_layer.logprobs_processor",
    "output_layer.requests",
    "results",
    "checkpoint.convert",
    "checkpoint.quantize",
    "checkpoint.inspect",
    "checkpoint.compare.verify",
    "streaming.sinks",
    "streaming.streamer",
    "streaming.vllm",
    "streaming.sglang",
    "testing.cpu",
    "testing.qwen3_5",
    "testing.ranks",
    "testing.training",
)

# A block that shows a file.
INCLUDED = re.compile(r"(<!-- (examples/\S+\.py) -->\n```python\n)(.*?)(^```$)", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#+ +(.*?) *$", re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def main(arguments: list[str]) -> int:
    """The exit status for these arguments: 0, 1 when the check found problems, 2 when they make no sense."""
    if not Path(megatron_fp32.__file__).is_relative_to(ROOT):
        raise SystemExit(f"expected the package of {ROOT}, got {megatron_fp32.__file__}: set PYTHONPATH={ROOT}")
    if arguments == ["pages"]:
        API.write_text(api_page())
        RECIPES.write_text(with_recipes(RECIPES.read_text()))
        return 0
    if len(arguments) != 2 or arguments[0] != "site":
        print(__doc__, file=sys.stderr)
        return 2
    out = Path(arguments[1])
    build(out)
    problems = [*outdated(), *undocumented(), *broken_links(PAGES), *broken_references(out)]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(problems)} problems; the API reference is {out / 'index.html'}")
    return bool(problems)


# Generated text


def api_page() -> str:
    """docs/api.md: every public name in one line."""
    lines = [
        "# API reference",
        "",
        "Import every name below from the top: `from megatron_fp32 import Fp32Config`. `make docs` builds the whole",
        "reference, with arguments, shapes, dtypes and errors, from the docstrings: open `build/docs/index.html`.",
        "`help(megatron_fp32.apply_fp32)` shows the same text. This page is written by `python docs/make.py pages`.",
    ]
    for title, names in SECTIONS.items():
        lines += ["", f"## {title}", "", "| name | what it is |", "|---|---|"]
        lines += [f"| `{name}` | {summary(getattr(megatron_fp32, name))} |" for name in names]
    lines += ["", "`__version__` is the version of the package."]
    return "\n".join(lines) + "\n"


def summary(thing: Any) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split()).replace("|", r"\|")


def with_recipes(page: str) -> str:
    """The page with the text of each recipe in the block below its name."""

    def block(found: re.Match[str]) -> str:
        return found[1] + (ROOT / found[2]).read_text() + found[4]

    return INCLUDED.sub(block, page)


def outdated() -> list[str]:
    """Which pages are not what `pages` would write."""
    said = {name for names in SECTIONS.values() for name in names}
    public = set(megatron_fp32.__all__) - {"__version__"}
    problems = [f"docs/make.py: SECTIONS lacks {name}" for name in sorted(public - said)]
    problems += [f"docs/make.py: SECTIONS has {name}, which is not public" for name in sorted(said - public)]
    for page, text in ((API, api_page()), (RECIPES, with_recipes(RECIPES.read_text()))):
        if page.read_text() != text:
            problems.append(f"{page.relative_to(ROOT)} is not current: run python docs/make.py pages")
    shown = {name for _, name, _, _ in INCLUDED.findall(RECIPES.read_text())}
    files = {str(path.relative_to(ROOT)) for path in ROOT.glob("examples/recipes/*.py")}
    return problems + [f"docs/recipes.md does not show {name}" for name in sorted(files - shown)]


# The API reference


def load() -> Any:
    """The package with every public name in it, where pdoc looks for it."""
    for name in megatron_fp32.__all__:
        setattr(megatron_fp32, name, getattr(megatron_fp32, name))
    return megatron_fp32


def build(out: Path) -> None:
    """Write the API reference, one HTML file a module."""
    import pdoc
    import pdoc.render

    load()
    pdoc.render.configure(
        docformat="google",
        footer_text=f"megatron_fp32 {megatron_fp32.__version__}",
        template_directory=ROOT / "docs" / "templates",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")  # a name that pdoc does not find
        # pdoc looks up a NamedTuple's field types in the package that exports it, not in the module that defines it.
        results = r".*\.(\w*Logprobs|WeightedLoss|LossWithMetrics|\w*Distillation)\.__init__"
        warnings.filterwarnings("ignore", message=results, module="pdoc")
        pdoc.pdoc("megatron_fp32", *[f"megatron_fp32.{name}" for name in MODULES], output_directory=out)


def undocumented() -> Iterator[str]:
    """Public names, and public methods and properties of public classes, that have no docstring."""
    load()
    modules = [megatron_fp32, *[importlib.import_module(f"megatron_fp32.{name}") for name in MODULES]]
    for module in modules:
        names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
        for name in names:
            thing = getattr(module, name)
            ours = getattr(thing, "__module__", "").startswith("megatron_fp32")
            if not ours or (module is not megatron_fp32 and thing.__module__ != module.__name__):
                continue
            if not inspect.getdoc(thing):
                yield f"{module.__name__}.{name} has no docstring"
            members = vars(thing).items() if inspect.isclass(thing) else ()
            for member, value in members:
                is_code = inspect.isfunction(value) or isinstance(value, (property, classmethod, staticmethod))
                if is_code and not member.startswith("_") and not inspect.getdoc(getattr(thing, member)):
                    yield f"{module.__name__}.{name}.{member} has no docstring"


# Links


def broken_links(pages: list[Path]) -> Iterator[str]:
    """Links between files, and to headings, that lead nowhere. Addresses on the web are not looked up."""
    for page in pages:
        for link in LINK.findall(CODE.sub("", page.read_text())):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path) if path else page
            if not target.exists():
                yield f"{page.relative_to(ROOT)}: no file {link}"
            elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text()):
                yield f"{page.relative_to(ROOT)}: no heading {link}"


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    found: set[str] = set()
    for heading in HEADING.findall(CODE.sub("", page)):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


def broken_references(site: Path) -> Iterator[str]:
    """Links within the built reference that lead nowhere."""
    pages: dict[Path, _Page] = {}
    for path in sorted(site.rglob("*.html")):
        pages[path.resolve()] = page = _Page()
        page.feed(path.read_text())
    if not pages:
        yield f"{site} holds no HTML"
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:|//", link):
                continue
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            if not target.exists():
                yield f"{path.name}: no file {link}"
            elif anchor and target in pages and anchor not in pages[target].ids:
                yield f"{path.name}: no anchor {link}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
