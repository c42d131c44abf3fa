"""Fixtures that several test files share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests compare exact numbers, and share cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json

import hypothesis
import pytest
import tiny

from surf import store, workers

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


@pytest.fixture
def crew(tmp_path, monkeypatch):
    """`crew(main)`: from now on a stage has two workers, which run `main` one after the other in this process.

    Returns a list; it holds what each worker found, and left, saved: rows of all its files.
    """

    def start(main):
        saved = []

        def lead(count, partials, total, **_):
            reports = []
            for index in range(count):
                role = {"index": index, "count": count, "result": str(tmp_path / "result.json")}
                with monkeypatch.context() as worker:
                    worker.setenv("SURF_WORKER", json.dumps(role))
                    main()
                reports.append(store.read_json(tmp_path / "result.json"))
                saved.append(sum(partial.read().num_rows for partial in partials))
            assert sum(one["rows"] for one in reports) == saved[-1]
            return [partial.read() for partial in partials], {k: v for one in reports for k, v in one["errors"].items()}

        monkeypatch.setenv("SURF_WORKERS", "2")
        monkeypatch.setattr(workers, "lead", lead)
        monkeypatch.setattr(workers, "_end_with_leader", lambda: None)
        return saved

    return start
