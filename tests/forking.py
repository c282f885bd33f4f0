"""Starts the commands as forks of one process that has imported everything, by orders on its standard input.

An order is a line of JSON, and so is its answer:

    {"command": [...], "env": {...}, "out": FILE, "limit": BYTES or null, "folder": DIR}    the process id
    {"wait": PID, "seconds": S}                                              its exit status, null if it still runs

Nothing of JAX has started when it forks, so a fork is as good as a fresh process.
"""

import json
import os
import resource
import runpy
import sys
import time
import traceback
import warnings

import spinejax.commands.evaluate
import spinejax.commands.train  # noqa: F401


def run(order):
    """In the fork: become the command."""
    out = os.open(order["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    err = os.open(order["out"] + ".err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.environ.update(order["env"])
    if order["limit"]:  # the kernel refuses to let any file grow beyond it
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
    script, *options = order["command"]
    sys.argv = [os.path.abspath(script), *options]
    os.chdir(order["folder"])
    status = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ending:
        status = ending.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def wait(pid, seconds):
    """The exit status, minus the signal if one ended it; None if the time is up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


if __name__ == "__main__":
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = wait(order["wait"], order["seconds"])
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # JAX warns of any fork; its threads start with the first computation
                answer = os.fork()
            if answer == 0:
                run(order)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
