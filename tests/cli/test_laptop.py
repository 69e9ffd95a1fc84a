"""Where only the packages that the page names are there, and not PyTorch, records are enough."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.pages import ROOT, blocks
from tests.report.studies import write_ladder

PAGE = ROOT / "docs" / "how-to" / "report.md"
ONLY = """
import sys
from importlib.metadata import packages_distributions, requires
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

def closure(names):
    found = set()
    while names:
        name = canonicalize_name(names.pop())
        if name not in found:
            found.add(name)
            needs = map(Requirement, requires(name) or ())
            names += [n.name for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})]
    return found

allowed = closure(sys.argv[1].split()) | {"factorlm"}
homes = packages_distributions()

class Blocker:
    def find_spec(self, name, path, target=None):
        top = name.split(".")[0]
        if top in homes and not {canonicalize_name(home) for home in homes[top]} & allowed:
            raise ModuleNotFoundError(f"{top} is not on the page")

for name in [name for name in sys.modules if name.split(".")[0] == "packaging"]:
    del sys.modules[name]
sys.meta_path.insert(0, Blocker())
try:
    import torch
except ModuleNotFoundError:
    pass
else:
    sys.exit("torch is there")
from factorlm.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "command",
    [
        "report records -o report.html --figures figures --markdown",
        "scale fit records -o figures",
        "scale published -o figures",
        "compare records/dense-w1-s0.jsonl records/dense-w2-s0.jsonl --plot losses.png",
    ],
)
@pytest.mark.slow
def test_the_packages_of_the_page_are_enough(command: str, tmp_path: Path) -> None:
    write_ladder(tmp_path / "records")
    (install,) = (block for block in blocks(PAGE, "sh") if "--no-deps" in block.text)
    match = re.search(r"^pip install ((?:\w+ ?)+)$", install.text, flags=re.MULTILINE)
    assert match
    done = subprocess.run(
        [sys.executable, "-c", ONLY, match[1], *command.split()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "not on the page" not in done.stderr
    assert done.stdout
