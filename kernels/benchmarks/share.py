"""A pytest plugin for check_gpu.py: processes share the tests, and note each result at once, so that a run cut off keeps them.

LITTLEBIT_SHARE=FOLDER LITTLEBIT_RESULTS=FILE pytest -p share ...      every process with that folder runs what none has begun

A test takes between a tenth of a second and half a minute, most of it compiling, so shares of equal numbers would not end together.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Optional

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: Optional[pytest.Item]) -> Optional[bool]:
    folder = os.environ.get("LITTLEBIT_SHARE")
    if not folder:
        return None
    claim = Path(folder) / hashlib.sha256(item.nodeid.encode()).hexdigest()
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return True  # another process has it: nothing is left to do here
    return None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # A test is its call; before and after it only failures count, and a skip before it.
    if report.when != "call" and report.outcome == "passed":
        return
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.failed:
        line["error"] = str(report.longreprtext).strip()[-600:]
    with open(os.environ["LITTLEBIT_RESULTS"], "a") as file:
        file.write(json.dumps(line) + "\n")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    # A process for which nothing was left has not failed.
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.testscollected:
        session.exitstatus = pytest.ExitCode.OK
