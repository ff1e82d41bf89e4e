"""`grpo download` notices weights that the cache lacks."""

import json

import pytest

from grpo.commands.download import _check_weights


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["model.safetensors"], None),
        (["pytorch_model.bin"], None),
        (["model.safetensors", "model.safetensors.index.json"], None),  # transformers takes the single file
        (["model.safetensors.index.json", "a.safetensors", "b.safetensors"], None),
        (["pytorch_model.bin.index.json", "a.safetensors", "b.safetensors"], None),
        (["model.safetensors.index.json", "a.safetensors"], "b.safetensors is missing, one of 2 files of weights"),
        (["pytorch_model.bin.index.json", "b.safetensors"], "a.safetensors is missing, one of 2 files of weights"),
        (["config.json"], "the files of the weights are missing"),
    ],
)
def test_missing_weights_are_named(tmp_path, files, said):
    index = json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}})
    for name in files:
        (tmp_path / name).write_text(index)
    if said is None:
        _check_weights(tmp_path)
        return
    with pytest.raises(FileNotFoundError, match=said):
        _check_weights(tmp_path)
