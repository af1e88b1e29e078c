"""The README, the guide and the help: their links, commands, code and paths."""

import ast
import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import keras_resnet
from keras_resnet import cli

ROOT = Path(keras_resnet.__file__).parents[1]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / name / "README.md" for name in ("benchmarks", "launchers")),
        *(ROOT / "docs").glob("*.md"),
    ]
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page, language):
    """Returns the code blocks of a page in a language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page):
    """Returns the command lines of a page, as lists of words."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    words = (shlex.split(line, comments=True) for line in lines)
    return [line for line in words if line]


def table_rows(page):
    """Returns the rows of a page's tables, as lists of cells without emphasis."""
    lines = re.findall(r"^\|(.*)\|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [[cell.strip(" *`") for cell in line.split("|")] for line in lines]


def anchors(page):
    """Returns the anchors of a page's headings, as repository pages make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


def parse(words):
    """Lets the command line's parser read the words after `keras-resnet`."""
    args = cli._parser().parse_args(words)
    if args.command == "launch" and args.worker_command[1] == "train":
        parse(args.worker_command[1:])


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_relative_to(ROOT) and linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_are_those_of_the_command_line(page, capsys):
    for words in commands(page):
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        try:
            if words[0] == "keras-resnet":
                parse(words[1:])
        except SystemExit:
            pytest.fail(f"{shlex.join(words)}: {capsys.readouterr().err}")
        for word in words:
            if re.fullmatch(r"(benchmarks|launchers|export|tests)/\S+", word):
                assert (ROOT / word.partition("::")[0]).exists(), word


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_code_uses_names_that_exist(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("keras_resnet"):
                module = __import__(node.module, fromlist=["*"])
                assert all(hasattr(module, alias.name) for alias in node.names), block
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = {"keras_resnet": keras_resnet, "weights": keras_resnet.weights}
                if node.value.id in owner:
                    assert hasattr(owner[node.value.id], node.attr), node.attr


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:keras_resnet|tests|benchmarks|export|docs)/[\w./]*)", text):
        assert (ROOT / path.rstrip(".")).exists(), path


def test_the_api_page_has_each_public_name():
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    public = [f"keras_resnet.{module}.{name}" for name, module in keras_resnet._EXPORTS.items()]
    assert sorted(listed) == sorted(public)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    subprocess.run(build, check=True, cwd=ROOT, timeout=300)
    for page in (ROOT / "docs").glob("*.md"):
        html = (tmp_path / "site" / page.with_suffix(".html").name).read_text(encoding="utf-8")
        # Nothing is loaded from the network.
        assert not re.findall(r"<(?:link|script|img)[^>]*(?:href|src)=\"?https?:", html)
    assert "build_resnet18" in (tmp_path / "site" / "api.html").read_text(encoding="utf-8")


def test_the_readme_is_read_to_the_end():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250


def test_the_readme_has_the_numbers_of_the_guide():
    guide = [row for page in (ROOT / "docs").glob("*.md") for row in table_rows(page)]
    compared = 0
    for name, *cells in table_rows(ROOT / "README.md"):
        numbers = {cell for cell in cells if re.fullmatch(r"[\d.,e/% -]*\d[\d.,e/% -]*", cell)}
        found = [row for row in guide if name and row[0].startswith(name)]
        if numbers and found:
            compared += 1
            assert any(numbers <= set(row) for row in found), (name, numbers)
    assert compared >= 18


@pytest.mark.parametrize("recipe", ["quick", "fast"])
def test_the_accuracy_of_a_recipe_is_that_of_the_ledger(recipe):
    lines = (ROOT / "benchmarks" / "accuracy.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["images"] == "test"]
    *_, last = (row for row in rows if row["recipe"] == recipe)
    same = ("recipe", "epochs", "model", "commit")
    runs = [row for row in rows if all(row[key] == last[key] for key in same)]
    assert len(runs) == 3
    mean = statistics.mean(row["accuracy"] for row in runs)
    minutes = statistics.mean(row["seconds"] for row in runs) / 60
    (shown,) = (
        row[2:]
        for row in table_rows(ROOT / "README.md")
        if row[0] == f"keras-resnet train --recipe {recipe}"
    )
    assert shown == [f"{mean:.4f}", f"{minutes:.1f}"]


@pytest.mark.parametrize("name", cli._COMMANDS)
def test_each_command_has_examples_in_its_help(name, capsys):
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    shown = capsys.readouterr().out
    examples = cli._COMMANDS[name].examples
    assert examples and all(f"  keras-resnet {each}\n" in shown for each in examples)
    for each in examples:
        parse(shlex.split(each))


@pytest.mark.thorough
@pytest.mark.parametrize("page", ["README.md", "docs/networks.md"])
def test_the_networks_of_a_page_are_built(page):
    """Runs the blocks that only build networks, each in a process of its own."""
    found = [
        block
        for block in blocks(ROOT / page, "python")
        if "build_" in block and "from_pretrained" not in block and "weights=" not in block
    ]
    assert found
    for block in found:
        script = f"import keras_resnet\n{block}"
        subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
