"""The package installed from a wheel, without the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.launches import ROOT

SOURCES = ("conf", "grpo", "hydra_plugins", "pyproject.toml", "README.md")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that is built from a clean copy of the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", ".", "-w", "wheel"]
    subprocess.run(pip, cwd=source, check=True, capture_output=True, text=True)
    (file,) = (source / "wheel").glob("*.whl")
    return file


def test_the_wheel_has_every_file_of_the_package_and_of_the_config_and_nothing_else(wheel):
    expected = set()
    for folder in ("conf", "grpo", "hydra_plugins"):
        files = {file.relative_to(ROOT) for file in (ROOT / folder).rglob("*") if file.is_file()}
        names = {str(file) for file in files if "__pycache__" not in file.parts}
        expected |= {f"grpo/{name}" for name in names} if folder == "conf" else names
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == expected


@pytest.mark.slow
def test_the_installed_commands_work_from_any_folder_without_the_checkout(wheel, tmp_path, small_run):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    cwd = tmp_path / "elsewhere"
    cwd.mkdir()

    def run(*command):
        environment = os.environ | {"PYTHONPATH": str(site)}
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = run(sys.executable, "-c", "import grpo.config.paths; print(grpo.__file__, grpo.config.paths.CONF_DIR)")
    assert found == f"{site / 'grpo' / '__init__.py'} {site / 'grpo' / 'conf'}\n"

    grpo = str(site / "bin" / "grpo")
    trained = run(grpo, "train", *small_run, "grpo.num_steps=1", "eval.before=false", "eval.after=false")
    (folder,) = cwd.glob("outputs/quickstart/*")
    assert (folder / "final_model" / "model.safetensors").exists()
    assert "python launch.py" not in trained
    (folder / "report.html").unlink()
    run(grpo, "report", f"run_dir={folder}")
    assert (folder / "report.html").exists()
    assert "jobs_at_once: null" in run(grpo, "train", "--cfg", "hydra", "-p", "hydra.launcher")
