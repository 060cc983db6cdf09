"""What docs/data.md names exists: tools, their flags, options, TensorBoard tags."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "data.md").read_text()
COMMANDS = re.findall(r"^python (tools/\w+\.py)(.*)$", TEXT, re.MULTILINE)
OPTIONS = set(yaml.safe_load((ROOT / "conf" / "data" / "shards.yaml").read_text()))


@pytest.mark.parametrize(("tool", "arguments"), COMMANDS)
def test_a_tool_knows_the_flags_that_it_is_shown_with(tool, arguments):
    code = (ROOT / tool).read_text()
    assert all(f'"{flag}"' in code for flag in re.findall(r"(?<!\S)--[a-z-]+", arguments.split("  #")[0]))


def test_every_option_of_the_data_is_an_option():
    named = set(re.findall(r"`data\.(\w+)", TEXT)) | {
        name for row in re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert len(named) > 12
    assert named <= OPTIONS


def test_links_lead_somewhere():
    assert all((ROOT / "docs" / path).exists() for path in re.findall(r"\]\((?!http)([^)]+)\)", TEXT))
