"""Where the lab keeps what it can make again: the user's cache folder. This file imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

from common.errors import UserError


def cache_dir() -> Path:
    """`$TLAB_CACHE`, else the platform's cache folder for "transformers-lab"; made if it is not there."""
    import platformdirs

    named = os.environ.get("TLAB_CACHE")
    folder = Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("transformers-lab"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache folder {folder}: {error.strerror}; set TLAB_CACHE to a folder you can write") from None
    return folder
