"""Fixtures of the workflow tests."""

import pytest
from flow import Workflow


@pytest.fixture
def workflow(tmp_path):
    """An empty working folder for the workflow."""
    return Workflow(tmp_path)
