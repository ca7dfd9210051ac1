"""The API reference has an entry for each public name, and loads nothing from a network."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module

import pytest

import noether
from noether.docs.__main__ import main
from noether.docs.api_reference import PACKAGES, find_modules, write_reference


class Page(HTMLParser):
    """Ids of the elements of a page, and addresses that it loads."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.loaded = set(), set()
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids.add(given.get("id"))
        if tag != "a":
            sources = {given[name] for name in ("src", "href") if name in given}
            self.loaded |= {source for source in sources if not source.startswith("data:")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    assert write_reference(folder, ["noether"]) == 1
    return folder


def test_each_public_name_has_an_entry(folder):
    page = Page(folder / "noether.html")
    assert set(noether.__all__) <= page.ids
    assert not page.loaded
    assert not re.search(r"@import|url\(['\"]?http", page.text)


def test_docstrings_are_rendered_as_sections(folder):
    text = (folder / "noether.html").read_text()
    assert "Arguments:" in text
    assert "Args:" not in text


def test_the_search_finds_public_names(folder):
    text = (folder / "search.js").read_text()
    assert all(f'"{name}"' in text for name in ("read_run", "EtaCallback", "LogFigure"))


def test_a_wrong_command_is_refused(tmp_path, capsys):
    assert main([]) == "usage: python -m noether.docs FOLDER"
    (tmp_path / "file").touch()
    assert str(main([str(tmp_path / "file" / "inside")])).startswith("cannot write the API reference: ")


def test_all_modules_are_found():
    assert {*PACKAGES, "noether.core.state", "noether.integrations.keras"} <= set(find_modules())


@pytest.mark.slow
def test_the_command_writes_all_modules_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "noether.docs", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not result.stderr
    for name in find_modules():
        page = Page(tmp_path / f"{name.replace('.', '/')}.html")
        assert set(getattr(import_module(name), "__all__", ())) <= page.ids
        assert not page.loaded
