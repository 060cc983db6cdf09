"""What the README tells people to type works; what it links to exists."""

from __future__ import annotations

import re
import shlex

import pytest

from infimed.config import stages
from infimed.contracts import UserError
from tests.conftest import ROOT
from tests.training.support import configured

TEXT = (ROOT / "README.md").read_text()
COMMANDS = [line.split("  #")[0].strip() for block in re.findall(r"```\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
MODULES = [c for c in COMMANDS if c.startswith("python -m infimed.")]


def test_it_is_short_and_its_files_exist():
    assert len(TEXT.splitlines()) < 200
    for path in re.findall(r"\]\((?!http)([^)]+)\)", TEXT) + re.findall(r"`?((?:samples|docs|conf)/[\w./]+\.(?:md|png|yaml))", TEXT):
        assert (ROOT / path).exists(), path


def test_the_set_up_is_two_make_targets_that_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    used = [c.split()[1] for c in COMMANDS if c.startswith("make ")]
    assert used == ["demo", "test"]
    assert set(used) <= set(targets)


@pytest.mark.parametrize("command", MODULES)
def test_a_command_composes_and_binds_or_says_what_is_missing(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    module, *arguments = shlex.split(command)[2:]
    name = module.removeprefix("infimed.")
    overrides = [re.sub(r"=([^\[]*),.*", r"=\1", a) for a in arguments if a != "-m"]  # the first point of a sweep
    config = configured(overrides, name)
    if name != "train":
        return
    try:
        chain = stages(config)
    except UserError as error:
        said = str(error)
    else:
        said = "" if chain else "nothing to run"
    assert not said or re.search(r"get it with|make shards with|init_from=", said)
    assert "no such option" not in said
    assert not (said and "experiment=quickstart" in command)


def test_following_the_commands_for_own_data_leaves_nothing_missing(monkeypatch, tmp_path):
    block = TEXT.split("## Your own data")[1].split("```")[1].strip().splitlines()
    made = {shlex.split(c)[shlex.split(c).index(flag) + 1] for c in block for flag in ("--out", "--local-dir") if flag in c}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        stages(configured(["experiment=pretrain"]))
    missing = re.findall(r"^- (?:weights\.\w+=|tokenizer=|data\.\w+ names )([\w./-]+?)[,:]? ", str(error.value), re.MULTILINE)
    assert len(missing) >= 5
    assert set(missing) <= made


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python tools/")])
def test_a_tool_exists_and_knows_the_flags(command):
    _, script, *arguments = shlex.split(command)
    source = (ROOT / script).read_text()
    for flag in (a for a in arguments if a.startswith("--")):
        assert f'"{flag}"' in source


def test_the_tree_in_the_readme_is_the_tree():
    tree = TEXT.split("## The tree")[1].split("```")[1]
    files = {path.name for folder in ("infimed", "tools") for path in (ROOT / folder).rglob("*.py")}
    assert set(re.findall(r"\b\w+\.py\b", tree)) <= files
    for folder in ("processing", "models", "data", "training", "evaluation"):
        assert f"  {folder}/" in tree
