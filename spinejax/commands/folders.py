"""The folders of results: on this machine, also if an option names a bucket."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spinejax.files.mirror import held, mirror_of
from spinejax.files.stores import Address, cache_folder
from spinejax.report import niivue, page


def hold(
    named: Mapping[str, Path | Address | None],
    of_out: Sequence[str],
    cache_dir: Path | None,
    enter: Callable[[contextlib.AbstractContextManager], Any],
) -> dict[str, Path]:
    """Where the folders of the results are on this machine, by the option that names them.

    Those in object stores are held, by contexts that `enter` enters, and copied there at the end. `of_out` are the
    patterns of the files that are replaced in `--out`.
    """
    replaced = {"--out": of_out, "--report": page.REPLACED, "--niivue": niivue.REPLACED}
    found = {option: folder for option, folder in named.items() if isinstance(folder, Path)}
    for address in dict.fromkeys(folder for folder in named.values() if isinstance(folder, Address)):
        options = [option for option, folder in named.items() if folder == address]
        patterns = [pattern for option in options for pattern in replaced[option]]
        mirror = mirror_of(address, cache_folder(cache_dir), "work", replaces=patterns)
        advice = f"Wait for it, or give another {' and '.join(options)}."
        enter(held(mirror, advice=advice, tell=print))
        found |= dict.fromkeys(options, mirror.folder)
    return found


def prepare_pages(named: Mapping[str, Path | Address | None]) -> None:
    """Make the pages' folders on this machine, and remove earlier pages from them."""
    for option, prepare in (("--report", page.prepare_folder), ("--niivue", niivue.prepare_folder)):
        if isinstance(folder := named.get(option), Path):
            prepare(folder)
