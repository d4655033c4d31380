"""Ctrl-C ends a command, whatever it does at that moment. Tier unit."""

from __future__ import annotations

import subprocess
import sys

import pytest

PATIENCE = 15.0
"""Seconds after which a command counts as one that does not end."""
WAIT = """
import os, signal, sys, threading, time, weakref
from ciliate import api_client

class Thing:
    pass

class Finalized:
    def __del__(self):
        interrupt()

def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(100):  # the interpreter looks for signals between steps
        pass

def finalizer():
    del_me = Finalized()
    del del_me

def weak_reference():
    thing = Thing()
    kept = weakref.ref(thing, interrupt)
    del thing
    return kept

def other_thread():
    # as a signal that comes between the interpreter's look for signals and the system call that waits
    main = threading.main_thread().native_id
    def wake():
        while open(f"/proc/self/task/{main}/stat").read().rpartition(")")[2].split()[0] != "S":
            time.sleep(0.01)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
    threading.Thread(target=wake, daemon=True).start()

moment = globals()[sys.argv[1]]

def request(*arguments, **options):
    moment()
    time.sleep(120)

api_client.ApiClient.request = request
sys.argv[:] = ["ciliate", "policy", "wait", "99"]
from ciliate.cli.main import main
main()
"""


@pytest.mark.parametrize("moment", ["finalizer", "weak_reference", "other_thread"])
def test_an_interrupt_ends_a_command_that_waits(moment: str) -> None:
    command = ["env", "--default-signal=INT", sys.executable, "-c", WAIT, moment]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 130, done.stderr
