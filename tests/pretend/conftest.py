"""Runs the tests of this folder in a process of their own, in which the accelerator is there from the beginning.

PyTorch's autograd counts the devices at a process's first backward pass, which other tests have done long before. The
process with the accelerator is another pytest, whose reports this one passes on.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
# In the process with the accelerator: the file descriptor for its reports.
REPORTS_VARIABLE = "CAP_HF_PRETEND_REPORTS"
IS_WORKER = REPORTS_VARIABLE in os.environ

if IS_WORKER:
    from support import pretend

    pretend.load()

    @pytest.fixture(autouse=True)
    def chosen() -> None:
        """Accelerators are of the device, whatever the test before has chosen."""
        pretend.choose("pretend")


class Worker:
    """The pytest with the accelerator, and what it reports."""

    def __init__(self, config: pytest.Config, names: list[str]) -> None:
        self.config = config
        self.output = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the process
        reading, writing = os.pipe()
        options = [f"--tb={config.option.tbstyle}", *(["--runxfail"] if config.option.runxfail else [])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *options, *names],
            cwd=config.rootpath,
            # Threads that wait for each other take most of the time of operators as small as these.
            env={**os.environ, REPORTS_VARIABLE: str(writing), "OMP_NUM_THREADS": "1"},
            pass_fds=[writing],
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )
        os.close(writing)
        self.reports = os.fdopen(reading)

    def reports_of(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """Yield the reports of one test as they come; a failed one where the process ends before the last."""
        for line in self.reports:
            report = self.config.hook.pytest_report_from_serializable(config=self.config, data=json.loads(line))
            if report.nodeid == item.nodeid:
                yield report
                if report.when == "teardown":
                    return
        self.output.seek(0)
        reason = f"the process with the accelerator has ended:\n{self.output.read().decode(errors='replace')[-4000:]}"
        yield pytest.TestReport(item.nodeid, item.location, {}, "failed", reason, "call")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.reports.close()
        self.output.close()


# A process per file: where several pytests share the tests, each has whole files (`--dist loadfile`).
WORKERS = pytest.StashKey[dict[Path, Worker]]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    if IS_WORKER or FOLDER not in item.path.parents:
        return None
    workers = item.config.stash.setdefault(WORKERS, {})
    if item.path not in workers:
        close_all(workers)
        names = [other.nodeid for other in item.session.items if other.path == item.path]
        workers[item.path] = Worker(item.config, names)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in workers[item.path].reports_of(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def close_all(workers: dict[Path, Worker]) -> None:
    """End the processes of the files before."""
    while workers:
        workers.popitem()[1].close()


def pytest_unconfigure(config: pytest.Config) -> None:
    close_all(config.stash.get(WORKERS, {}))


class Reporter:
    """Sends the reports of this process to the pytest that has started it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.reports = os.fdopen(int(os.environ[REPORTS_VARIABLE]), "w")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        print(json.dumps(data), file=self.reports, flush=True)


def pytest_configure(config: pytest.Config) -> None:
    if IS_WORKER:
        config.pluginmanager.register(Reporter(config))
