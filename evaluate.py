"""Grade discs with a trained network: `python evaluate.py --checkpoint RUN --data DIR [--tta]`."""

from spinejax.errors import installed

with installed():
    from spinejax.commands.evaluate import cli

if __name__ == "__main__":
    cli()
