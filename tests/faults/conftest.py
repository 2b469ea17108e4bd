"""A run that nobody disturbed, to compare the others with."""

import jobs
import pytest


@pytest.fixture(autouse=True)
def _nothing_goes_on():
    """A test that fails leaves no process behind."""
    yield
    while jobs.going_on:
        jobs.going_on.pop().kill()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The folder of a run of ``jobs.EVERYTHING``."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = jobs.run(folder, *jobs.EVERYTHING)
    assert ended.status == 0, ended.said
    return folder
