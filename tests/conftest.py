"""Fixtures that several test files share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests compare exact numbers, and share cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import tiny

# no deadline: no test is about time; the same examples in every run, so that a failure can be repeated
hypothesis.settings.register_profile("surf", deadline=None, max_examples=50, derandomize=True, database=None)
hypothesis.settings.load_profile("surf")


@pytest.fixture(scope="session")
def tiny_lvlm(tmp_path_factory):
    """Folder of a tiny LLaVA with random weights."""
    return tiny.build_lvlm(tmp_path_factory.mktemp("lvlm"))


@pytest.fixture(scope="session")
def drawn_images(tmp_path_factory):
    """Folder with images q0.png to q5.png and r0.png to r7.png."""
    names = [f"q{number}.png" for number in range(6)] + [f"r{number}.png" for number in range(8)]
    return tiny.draw_images(tmp_path_factory.mktemp("images"), names)
