"""Train SpineNet: `python train.py PRESET --data DIR --workdir RUN [--option value]…`."""

from spinejax.errors import installed

with installed():
    from spinejax.commands.train import cli

if __name__ == "__main__":
    cli()
