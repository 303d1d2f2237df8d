"""One bundle of experiment 4 on the virtual clock, made once and copied for whoever wants to break it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nanovllm.lab.experiment_4.run import Settings, run_experiment
from nanovllm.lab.student_observer import Observation
from tests.lab.students import COUNTER


@pytest.fixture(scope="session")
def whole_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick run with a student's state counter. Read only."""
    folder = tmp_path_factory.mktemp("experiment_4")
    source = folder / "counter.py"
    source.write_text(COUNTER, encoding="utf-8")
    settings = Settings(model=None, quick=True, lang="zh")
    run_experiment(folder / "bundle", settings, Observation(f"{source}:Counter"), command="nanovllm lab run 4")
    return folder / "bundle"


@pytest.fixture
def bundle(whole_bundle: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(whole_bundle, tmp_path / "bundle")
