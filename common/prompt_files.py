"""Prompts from a file, for `--prompts`. Scripts reach this through `common.cli`; no torch is imported."""

import json
from pathlib import Path

from common.errors import UserError
from common.sweeps import shown


def read_prompts(path: str | Path) -> list[str]:
    """Prompts from a file: one a line, blank lines skipped.

    A name that ends in .jsonl holds JSON lines, each a string or {"prompt": string}. Errors name the line.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    prompts = []
    for number, raw in enumerate(lines, start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\r")
        except UnicodeDecodeError:
            raise UserError(f"{path} line {number}: not UTF-8 text; save the file as UTF-8") from None
        if line.strip():
            prompts.append(_json_prompt(line, path, number) if path.suffix == ".jsonl" else line)
    if not prompts:
        raise UserError(f"--prompts: {path} holds no prompt; write one a line")
    return prompts


def _json_prompt(line: str, path: Path, number: int) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} line {number}: not JSON ({error}); a .jsonl file holds one JSON value a line"
        ) from None
    if isinstance(value, dict):
        unknown = [key for key in value if key != "prompt"]
        if unknown:
            raise UserError(f'{path} line {number}: unknown key {shown(unknown[0])}; only "prompt" is read')
        value = value.get("prompt")
    if not isinstance(value, str) or not value.strip():
        raise UserError(f'{path} line {number}: no prompt; a line is "text" or {{"prompt": "text"}}')
    return value
