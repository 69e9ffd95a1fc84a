"""What every benchmark does with its result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def publish(result: dict[str, Any], output: Path | None) -> None:
    """Print ``result`` and append it as one line of JSON to ``output``, if that is given."""
    print(json.dumps(result, indent=2))
    if output is not None:
        with output.open("a") as file:
            file.write(json.dumps(result) + "\n")
