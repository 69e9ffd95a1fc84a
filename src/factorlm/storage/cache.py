"""Where things lie that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$FACTORLM_CACHE``, else ``$XDG_CACHE_HOME/factorlm``, else ``~/.cache/factorlm``.

    It may not be there. A relative ``XDG_CACHE_HOME`` counts as none, as its standard says.
    """
    own = os.environ.get("FACTORLM_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    return Path(base) / "factorlm"
