"""The language rules of noether/ARCHITECTURE.md that a program can check."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
THIS = Path(__file__).relative_to(ROOT)

PHRASES = re.compile(
    r"\b(anew|whoever|nobody|of (?:one's|their|your) own|(?:gone|goes|go|going) on with|"
    r"(?:is|are|was|were|being|been) told|(?:is|are|was|were|been) owed|owed|what else is|what is due|in vain|"
    r"(?-i:(?<!there )(?:is|are) none)|will bite|is to be said|no more than one is)\b",
    re.IGNORECASE,
)
PARTICIPLE = re.compile(
    r"_?([a-z]+(ed|en|ept|ade|eld|old|aid|ost|ound)|told|put|cut|lost|sent|built|begun|gone|met|left)"
)
VERBS_AND_NOUNS = {
    *(
        "accept",
        "bound",
        "children",
        "compound",
        "embed",
        "even",
        "exceed",
        "feed",
        "fold",
        "found",
        "freeze",
        "golden",
        "hidden",
    ),
    *("hold", "listen", "need", "open", "reopen", "scaffold", "screen", "seed", "speed", "then", "threshold", "token"),
    "when",
}


def tracked(*suffixes):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S607  # git is found in PATH
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if name.endswith(suffixes) and Path(name) != THIS]


def test_no_file_holds_a_banned_phrase():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]!r} in {line.strip()!r}"
        for path in tracked(".py", ".pyi", ".md", ".yaml", ".yml", ".toml")
        if path.exists()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (match := PHRASES.search(line))
    ]
    assert not found, "write who does what, in standard terms:\n" + "\n".join(found)


def test_no_module_function_is_named_by_a_bare_participle():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"
        for path in tracked(".py")
        if path.exists() and path.is_relative_to(ROOT / "noether")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and PARTICIPLE.fullmatch(node.name)
        and node.name.lstrip("_") not in VERBS_AND_NOUNS
    ]
    assert not found, "name a function by a verb phrase or by the noun that it returns:\n" + "\n".join(found)
