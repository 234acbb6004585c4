"""Fresh interpreters: without the extension, and many of them by one start."""

import json
import subprocess
import sys

from conftest import ROOT, settings

HIDE_NATIVE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "sslkern._C":
            raise ImportError("hidden by the test")
sys.meta_path.insert(0, Hide())
"""


def python(*arguments, timeout=120, **environment):
    """Run a fresh interpreter in the repository's root."""
    options = {"cwd": ROOT, "env": settings(**environment), "capture_output": True, "text": True, "timeout": timeout}
    return subprocess.run([sys.executable, *arguments], **options)


FORKS = """
import json, os, sys, tempfile
import torch
done = []
for code, environment in json.load(sys.stdin):
    streams = [tempfile.TemporaryFile("w+") for _ in range(2)]
    if not (child := os.fork()):
        for number, stream in enumerate(streams, 1):
            os.dup2(stream.fileno(), number)
        os.environ |= environment
        sys.argv = ["-c"]
        exec(code, {"__name__": "__main__"})
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)  # a fork's own end takes a second
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    done.append([status, *(stream.seek(0) or stream.read() for stream in streams)])
print(json.dumps(done))
"""


def pythons(*runs, first="import torch", **environment):
    """Codes, each with its environment, in interpreters that have torch, or what `first` imports, and nothing else:
    one start for all of them, which then forks."""
    options = {"cwd": ROOT, "env": settings(**environment), "capture_output": True, "text": True, "timeout": 300}
    command = [sys.executable, "-c", FORKS.replace("import torch", first, 1)]
    done = subprocess.run(command, input=json.dumps(runs), **options)
    assert done.returncode == 0, done.stderr
    return [subprocess.CompletedProcess(run[0], *told) for run, told in zip(runs, json.loads(done.stdout), strict=True)]
