"""Draw the pictures of the pages: ``python docs/pictures [folder]``, by default ``docs/images``.

Needs the extra ``dev``. Counts and fits are made anew, measurements are read from the reports.
"""

from __future__ import annotations

import sys
from pathlib import Path

from guides import guides
from measured import accounting, premerge, scaling
from structures import shuffles, structures
from style import context, save

PICTURES = {
    "structures": structures,
    "block_shuffle": shuffles,
    "guides": guides,
    "premerge": premerge,
    "accounting": accounting,
    "scaling": scaling,
}
FOLDER = Path(__file__).resolve().parents[1] / "images"


def main(folder: Path) -> None:
    """Write every picture as SVG to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with context():
        for name, draw in PICTURES.items():
            save(draw(), folder / f"{name}.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
