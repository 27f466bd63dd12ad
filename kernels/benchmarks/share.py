"""A pytest plugin for check_gpu.py: run every n-th test, and note each result at once, so that a run cut off keeps them.

LITTLEBIT_SHARE=3/8 LITTLEBIT_RESULTS=FILE pytest -p share ...       the third of eight shares, results as lines of JSON
"""

import json
import os

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list) -> None:
    part, parts = map(int, os.environ.get("LITTLEBIT_SHARE", "1/1").split("/"))
    kept = items[part - 1 :: parts]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # A test is its call; before and after it only failures count, and a skip before it.
    if report.when != "call" and report.outcome == "passed":
        return
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.failed:
        line["error"] = str(report.longreprtext).strip()[-600:]
    with open(os.environ["LITTLEBIT_RESULTS"], "a") as file:
        file.write(json.dumps(line) + "\n")
