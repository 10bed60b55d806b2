"""Where the lab keeps what it can make again: the user's cache folder. This file imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

from common.errors import UserError


def cache_dir() -> Path:
    """`$TLAB_CACHE`, else the platform's cache folder for "transformers-lab"; made if it is not there."""
    named = os.environ.get("TLAB_CACHE")
    folder = Path(os.path.expanduser(named)) if named else _platform_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache folder {folder}: {error.strerror}; set TLAB_CACHE to a folder you can write") from None
    return folder


def _platform_folder() -> Path:
    try:
        import platformdirs
    except ImportError:  # a machine that was set up for something else; this is what it gives on Linux
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transformers-lab"
    return Path(platformdirs.user_cache_dir("transformers-lab"))
