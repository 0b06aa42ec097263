"""The generated pages are current, public names are documented, links lead somewhere; and docs/make.py would notice."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import megatron_fp32

ROOT = Path(__file__).parent.parent


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "make.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in megatron_fp32.__all__:  # `load` puts them there; monkeypatch takes them away again
        monkeypatch.setitem(vars(megatron_fp32), name, getattr(megatron_fp32, name))
    return module


def test_the_generated_pages_are_current(make: ModuleType) -> None:
    assert make.outdated() == []


def test_every_public_name_is_on_the_page_with_a_sentence(make: ModuleType) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", make.API.read_text(), re.MULTILINE))
    assert sorted(rows) == sorted(set(megatron_fp32.__all__) - {"__version__"})
    assert all(sentence.endswith(".") for sentence in rows.values())


def test_a_page_that_is_not_current_is_named(make: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "api_page", lambda: "another text")
    assert make.outdated() == ["docs/api.md is not current: run python docs/make.py pages"]


def test_a_recipe_that_the_page_shows_in_an_old_state_is_noticed(make: ModuleType) -> None:
    page = "<!-- examples/recipes/slime_fp32.py -->\n```python\nold = True\n```\nmore text\n"
    current = make.with_recipes(page)
    assert current != page
    assert current.endswith("```\nmore text\n")
    assert (ROOT / "examples/recipes/slime_fp32.py").read_text() in current


def test_a_recipe_that_the_page_does_not_show_is_named(
    make: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "recipes.md"
    page.write_text(make.RECIPES.read_text().replace("<!-- examples/recipes/verl_fp32.py -->", ""))
    monkeypatch.setattr(make, "RECIPES", page)
    assert make.outdated() == ["docs/recipes.md does not show examples/recipes/verl_fp32.py"]


def test_a_public_name_that_no_section_has(make: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_fp32, "__all__", [*megatron_fp32.__all__, "new_name"])
    assert make.outdated() == ["docs/make.py: SECTIONS lacks new_name"]


def test_public_names_have_docstrings(make: ModuleType) -> None:
    assert list(make.undocumented()) == []


@pytest.mark.parametrize("member", ["on the class", "on a method"])
def test_a_name_without_a_docstring_is_named(make: ModuleType, monkeypatch: pytest.MonkeyPatch, member: str) -> None:
    class Bare:
        def method(self) -> None: ...

    Bare.__module__ = "megatron_fp32.config"
    if member == "on a method":
        Bare.__doc__ = "A class."
    monkeypatch.setitem(vars(megatron_fp32), "Fp32Config", Bare)
    expected = ["megatron_fp32.Fp32Config has no docstring"] if member == "on the class" else []
    assert list(make.undocumented()) == [*expected, "megatron_fp32.Fp32Config.method has no docstring"]


def test_links_in_the_pages_lead_somewhere(make: ModuleType) -> None:
    assert list(make.broken_links(make.PAGES)) == []


def test_links_that_lead_nowhere_are_named(make: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(make, "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# A `code` heading, twice\n# A `code` heading, twice\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](missing.md) ![c](other.md#a-code-heading-twice-1) [d](other.md#no-heading) [e](#here)\n"
        "[f](https://example.org/not/looked/up)\n```\n[g](in_a_block.md)\n```\n## Here\n"
    )
    assert list(make.broken_links([page])) == ["page.md: no file missing.md", "page.md: no heading other.md#no-heading"]


def test_links_in_the_reference_that_lead_nowhere_are_named(make: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(
        '<a href="b.html#name">1</a><a href="b.html#gone">2</a><a href="c.html">3</a><a href="#top">4</a>'
        '<a href="https://example.org">5</a>'
    )
    (tmp_path / "b.html").write_text('<p id="name">')
    assert list(make.broken_references(tmp_path)) == [
        "index.html: no anchor b.html#gone",
        "index.html: no file c.html",
        "index.html: no anchor #top",
    ]
    assert list(make.broken_references(tmp_path / "empty")) == [f"{tmp_path / 'empty'} holds no HTML"]


@pytest.mark.parametrize("arguments", [[], ["site"], ["unknown"]])
def test_other_arguments_print_how_it_is_used(make: ModuleType, capsys: Any, arguments: list[str]) -> None:
    assert make.main(arguments) == 2
    assert "python docs/make.py pages" in capsys.readouterr().err
