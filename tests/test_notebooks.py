"""The notebooks, run from top to bottom as a user runs them, on the embedded model."""

import copy
import os
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.launches import launch

ROOT = Path(__file__).resolve().parent.parent
SMALL = "grpo.batch_size=4 grpo.num_generations=4 eval.max_problems=8 tracking=disabled"


def outputs(notebook):
    """All text that the cells printed or displayed."""
    texts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            texts.append(output.get("text") or str(output.get("data", {}).get("text/plain", "")))
    return "\n".join(texts)


@pytest.fixture
def working_copy(tmp_path):
    """A copy of the project, so that a notebook writes nothing into the project itself."""
    for name in ("conf", "grpo", "hydra_plugins", "notebooks", "launch.py", "pyproject.toml"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return tmp_path


@pytest.mark.slow
def test_the_notebook_for_a_free_gpu_runs(working_copy, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(working_copy))
    notebook = nbformat.read(working_copy / "notebooks" / "colab.ipynb", as_version=4)
    settings = next(cell for cell in notebook.cells if cell.source.startswith("REPOSITORY"))
    settings.source = (
        f'REPOSITORY = ""\nQUICKSTART = "experiment=quickstart grpo.num_steps=2 {SMALL}"\n'
        f'SETTINGS = "experiment=quickstart tuning=lora grpo.num_steps=2 {SMALL}"'
    )
    notebook.cells += [nbformat.from_dict(copy.deepcopy(cell)) for cell in notebook.cells]  # each cell can be run again
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": working_copy / "notebooks"}}).execute()

    said = outputs(notebook)
    assert said.count("has finished already: nothing to do") == 2
    assert "error" not in said.lower()
    assert "failed" not in said.lower()
    for expected in ("peak memory", "pre-flight", "held-out problems", "rewards/format/mean", "merged_model"):
        assert expected in said, expected
    assert len(images(notebook)) == 4
    for run in ("notebook_quickstart", "notebook"):
        assert (working_copy / "outputs" / run / "final_model").exists()
    assert (working_copy / "outputs" / "notebook" / "merged_model" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_notebook_for_a_free_gpu_clones_the_project_or_asks_for_its_address(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # so that nothing is installed
    notebook = nbformat.read(ROOT / "notebooks" / "colab.ipynb", as_version=4)
    install = next(cell.source for cell in notebook.cells if cell.source.startswith("import importlib"))

    def run(repository):
        cells = [f"REPOSITORY = {repository!r}", install, install, "print('in', Path.cwd())"]
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        NotebookClient(book, timeout=120, resources={"metadata": {"path": tmp_path}}).execute()
        return outputs(book)

    with pytest.raises(CellExecutionError, match="set REPOSITORY in the first cell to the address of the project"):
        run("")
    assert list(tmp_path.iterdir()) == []
    assert f"in {tmp_path / 'grpo'}" in run(str(ROOT))
    assert (tmp_path / "grpo" / "launch.py").exists()


def executed(name, cwd, monkeypatch):
    """Execute a notebook in `cwd`/notebooks, next to `cwd`/outputs, and return it."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    (cwd / "notebooks").mkdir()
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": cwd / "notebooks"}}).execute()
    return notebook


def images(notebook):
    return [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]


@pytest.mark.slow
def test_the_notebook_of_a_run_shows_the_newest_run(tmp_path, monkeypatch):
    small = [*SMALL.split(), "grpo.num_steps=3", "samples.every=1", "hardware.threads=1"]
    assert launch("experiment=quickstart", *small, cwd=tmp_path).returncode == 0
    notebook = executed("run.ipynb", tmp_path, monkeypatch)
    said = outputs(notebook)
    for expected in ("rewards/format", "before", "no problems found", "lenient only", "text after the answer", "---"):
        assert expected in said, expected
    assert len(images(notebook)) == 2


@pytest.mark.slow
def test_the_notebook_of_a_sweep_shows_the_newest_sweep(tmp_path, monkeypatch):
    small = [*SMALL.split(), "grpo.num_steps=2", "hydra/launcher=basic", "grpo.beta=0,0.04", "seed=1,2"]
    assert launch("-m", "experiment=quickstart", *small, cwd=tmp_path).returncode == 0
    notebook = executed("sweep.ipynb", tmp_path, monkeypatch)
    said = outputs(notebook)
    for expected in (
        "0_grpo.beta_0_seed_1",
        "Both arms have the same result",
        "seed=3,4,5",
        "0 -> 0.04",
        "no difference shown",
    ):
        assert expected in said, expected
    assert len(images(notebook)) == 2


def test_the_default_settings_of_the_notebook_compose_to_qwen_with_lora():
    from grpo.config.compose import compose_config

    notebook = nbformat.read(ROOT / "notebooks" / "colab.ipynb", as_version=4)
    values = {}
    exec(next(cell.source for cell in notebook.cells if cell.source.startswith("REPOSITORY")), values)
    config = compose_config(values["SETTINGS"].split())
    assert (config.model.name, config.model.lora.rank) == ("Qwen/Qwen2.5-0.5B-Instruct", 32)
    assert compose_config(values["QUICKSTART"].split()).model.name == "tiny"
    assert all(not cell.get("outputs") for cell in notebook.cells)  # the notebook is stored without outputs
