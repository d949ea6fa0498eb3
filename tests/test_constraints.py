"""The constraints file names versions only, so that it works on any machine."""

import re
from pathlib import Path


def test_every_line_is_a_name_and_a_version() -> None:
    lines = (Path(__file__).parent.parent / "constraints.txt").read_text().splitlines()
    assert len(lines) > 50
    assert not [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.+!-]+", line)]
