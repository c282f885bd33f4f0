"""`python -m data_prep`: make, verify and look at data sets.

Exit status: 0 done; 2 the user can fix it (the message says how); 130 interrupted; 1 a fault of ours.
"""

import sys
from pathlib import Path

from spinejax.errors import installed, status_of

with installed():
    import tyro

    from data_prep.commands.detector import detect_eval, train_detector
    from data_prep.commands.look import inspect, inventory, overlay, stats, verify
    from data_prep.commands.make import fold, phantom, pooled, scans, spider
    from data_prep.commands.results import results
    from spinejax.files.addresses import PATHS

_MAKE = (phantom, spider, pooled, scans, fold)
_LOOK = (inventory, overlay, verify, stats, inspect)
_COMMANDS = (*_MAKE, *_LOOK, results, train_detector, detect_eval)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    return status_of(
        lambda: tyro.extras.subcommand_cli_from_dict(
            {command.__name__.replace("_", "-"): command for command in _COMMANDS},
            args=arguments,
            prog="spinejax-prep" if Path(sys.argv[0]).stem == "spinejax-prep" else "python -m data_prep",
            description="Make, verify and look at data sets of intervertebral discs.",
            config=(tyro.conf.OmitArgPrefixes,),
            registry=PATHS,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
