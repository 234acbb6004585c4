"""A pytest plugin that records every outcome as it comes, and spends the time there is on some of every test."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest

from .machine import Record

_record = Record(Path(os.environ["BENCH_GPU_ROWS"]), "tests")
_collected: set[str] = set()
RESERVE = 10.0  # seconds for what runs when time is over, and for the processes to end


class _Controller:
    """In the one process that hears of all tests."""

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        if not _collected:
            _collected.update(ids)
            _record.row("collected", value=len(ids))

    def pytest_collection_finish(self, session):
        if session.items and not _collected:
            _collected.update(item.nodeid for item in session.items)
            _record.row("collected", value=len(_collected))

    def pytest_collectreport(self, report):
        if report.failed:
            _record.row(report.nodeid or "collection", False, note=str(report.longrepr)[-400:])

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return
        ok = None if report.skipped else report.passed
        text = report.longreprtext if report.failed else str(report.longrepr[-1]) if report.skipped else ""
        errors = [line[2:].strip() for line in text.splitlines() if line.startswith("E ")]
        note = " | ".join(errors[:3]) or text[-300:]
        _record.row(report.nodeid, ok, seconds=round(report.duration, 2), note=note[:600])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """The first parameters of every test, then the second ones, and so on: the same order in every process."""
    seen: Counter[str] = Counter()
    turns = {}
    for item in items:
        function = item.nodeid.partition("[")[0]
        turns[item], seen[function] = seen[function], seen[function] + 1
    items.sort(key=turns.__getitem__)


def pytest_runtest_setup():
    if time.time() > float(os.environ["BENCH_GPU_UNTIL"]) - RESERVE:
        pytest.skip("no time was left")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Controller(), "bench-gpu-controller")
