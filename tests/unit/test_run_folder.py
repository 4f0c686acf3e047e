"""Run folder: who may use it, what a resume may change, in one sentence each."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from strop.engine.config import InputError, Layout
from strop.engine.run.folder import RunConfig, RunFolder, saved_steps, settings_as_json


@dataclass(frozen=True)
class Train:
    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    loss_kind: str = "clip"


@dataclass(frozen=True)
class Settings:
    run: RunConfig = field(default_factory=RunConfig)
    train: Train = field(default_factory=Train)
    layout: Layout = field(default_factory=Layout)
    model: Path = Path("models/x")
    seed: int = 0


def started(path: Path, *steps: int) -> Settings:
    """A run that ended after saving the given steps; returns its settings."""
    settings = Settings(run=RunConfig(dir=path))
    folder = RunFolder.open(settings.run, settings, "tiny")
    folder._lock.close()
    for step in steps:
        (path / f"checkpoints/step-{step}").mkdir(parents=True)
    return settings


def resume(settings: Settings, path: Path) -> RunFolder:
    run = replace(settings.run, dir=path, resume=True, stop_at=7)
    return RunFolder.open(run, replace(settings, run=run), "tiny")


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(lambda _: RunFolder.open(RunConfig(), Settings(), "tiny").path, range(8)))
    assert len(set(folders)) == 8


def test_a_run_that_never_began_may_begin_again(tmp_path):
    settings = started(tmp_path / "r")
    assert resume(settings, tmp_path / "r").path == tmp_path / "r"
    mended = started(tmp_path / "s")
    mended = replace(mended, train=Train(lr=3e-6))
    assert RunFolder.open(mended.run, mended, "tiny").path == tmp_path / "s"
    assert json.loads((tmp_path / "s/config.json").read_text())["train"]["lr"] == 3e-6


def test_new_folder_holds_the_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = RunFolder.open(RunConfig(), Settings(), "tiny")
    second = RunFolder.open(RunConfig(), Settings(), "tiny")
    assert first.path.parent == Path("runs") and first.path.name.startswith("tiny-20") and first.path != second.path
    recorded = json.loads((first.path / "config.json").read_text())
    assert recorded["train"] == {"lr": 1e-6, "betas": [0.9, 0.95], "loss_kind": "clip"} and recorded["model"] == "models/x"
    assert first.settings_digest == second.settings_digest


def test_a_resume_takes_the_newest_step_and_may_change_run_only(tmp_path):
    settings = started(tmp_path / "r", 9, 10, 100)
    folder = resume(settings, tmp_path / "r")
    assert saved_steps(folder.checkpoints) == [9, 10, 100]
    assert json.loads((tmp_path / "r/config.json").read_text())["run"]["stop_at"] is None, "the first start's record stays"
    folder._lock.close()
    other = replace(settings, train=Train(lr=2e-6, betas=(0.9, 0.99)), layout=Layout(tp=2))
    with pytest.raises(InputError) as error:
        resume(other, tmp_path / "r")
    told = str(error.value)
    assert "--train.lr was 1e-06, now 2e-06" in told and "--train.betas was [0.9, 0.95], now [0.9, 0.99]" in told
    assert "--layout.tp was 1, now 2" in told and "run" not in told.split(";")[1]
    assert RunFolder.open(RunConfig(dir=tmp_path / "o"), other, "tiny").settings_digest != folder.settings_digest


def test_a_setting_that_came_or_went_is_named(tmp_path):
    settings = started(tmp_path, 1)
    recorded = json.loads((tmp_path / "config.json").read_text())
    del recorded["train"]["loss_kind"]
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    with pytest.raises(InputError, match=r'--train\.loss-kind was not there, now "clip"'):
        resume(settings, tmp_path)


@pytest.mark.parametrize(
    "prepare, run, message",
    [
        (lambda path: started(path, 3), {}, "already holds a run: add --run.resume"),
        (lambda path: started(path) and (path / "metrics.jsonl").touch(), {}, "already holds a run: add --run.resume"),
        (lambda path: path.mkdir() or (path / "a.txt").write_text("x"), {}, r"not empty \(it holds a.txt\) and is no run"),
        (lambda path: path.write_text("x"), {}, "is a file: name a folder"),
        (lambda path: None, {"resume": True}, "is not a folder, so no run was started there: check --run.dir"),
        (lambda path: path.mkdir(), {"resume": True}, "holds no config.json, so no run was started there"),
        (lambda path: started(path, 3) and (path / "config.json").write_text("{"), {"resume": True}, "config.json is not JSON"),
    ],
)
def test_refused_folders(tmp_path, prepare, run, message):
    path = tmp_path / "r"
    prepare(path)
    before = sorted(tmp_path.rglob("*"))
    config = RunConfig(dir=path, **run)
    with pytest.raises(InputError, match=message):
        RunFolder.open(config, Settings(run=config), "tiny")
    assert [entry for entry in sorted(tmp_path.rglob("*")) if entry.name != ".lock"] == [e for e in before if e.name != ".lock"]


def test_every_rank_gets_the_name_or_the_mistake(tmp_path):
    told = []
    first = RunFolder.open(RunConfig(dir=tmp_path / "r"), Settings(), "tiny", share=lambda value: told.append(value) or value)
    other = RunFolder.open(RunConfig(), Settings(), "tiny", rank=1, share=lambda value: told[0])
    assert other.path == first.path and other.settings_digest == first.settings_digest and other._lock is None
    with pytest.raises(InputError) as on_first:
        RunFolder.open(RunConfig(dir=tmp_path), Settings(), "tiny", share=lambda value: told.append(value) or value)
    with pytest.raises(InputError) as on_other:
        RunFolder.open(RunConfig(dir=tmp_path), Settings(), "tiny", rank=1, share=lambda value: told[1])
    assert str(on_first.value) == str(on_other.value)


HOLDER = """
import sys, time
from pathlib import Path
from strop.engine.run.folder import _lock
lock = _lock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def test_lock_of_a_living_run_and_of_a_dead_one(tmp_path):
    settings = started(tmp_path, 5)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"locked\n"
        for attempt in (lambda: resume(settings, tmp_path), lambda: RunFolder.open(settings.run, settings, "tiny")):
            with pytest.raises(InputError, match=f"is in use by process {holder.pid} on "):
                attempt()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    resume(settings, tmp_path)
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"save_every": 0}, "--run.save-every 0: must be at least 1"),
        ({"keep": 0}, "--run.keep 0: must be at least 1"),
        ({"stop_at": 0}, "--run.stop-at 0"),
        ({"stall_seconds": -1}, "--run.stall-seconds -1"),
        ({"sample_groups": -1}, "--run.sample-groups -1"),
        ({"resume": True}, "--run.resume needs --run.dir"),
    ],
)
def test_contradictory_settings(bad, message):
    with pytest.raises(InputError, match=message):
        RunConfig(**bad)


def test_settings_that_json_cannot_hold():
    with pytest.raises(TypeError, match="object"):
        settings_as_json(Settings(seed=object()))
    with pytest.raises(ValueError):
        settings_as_json(Settings(train=Train(lr=float("nan"))))
