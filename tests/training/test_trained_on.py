"""grpo.train_on and grpo.mask_truncated_completions in a whole run."""

from tests.launches import SHORT, launch, resume, rows

OWN = [*SHORT, "grpo.mu=2", "grpo.num_generations=4", "checkpoint.every=1"]


def test_a_run_on_a_part_of_its_completions_is_resumed_bit_for_bit(tmp_path):
    part = ["grpo.train_on=2", "grpo.mask_truncated_completions=true", "grpo.max_completion_length=20"]
    assert launch(*OWN, *part, "run_dir=straight", cwd=tmp_path).returncode == 0
    assert launch(*OWN, *part, "run_dir=stopped", "until_step=1", cwd=tmp_path).returncode == 0
    assert resume(tmp_path / "stopped").returncode == 0
    straight = rows(tmp_path / "straight")
    assert rows(tmp_path / "stopped") == straight
    assert any(0 < row["completions/clipped_ratio"] < 1 for row in straight)
    assert launch(*OWN, part[2], "run_dir=all", "grpo.num_steps=1", cwd=tmp_path).returncode == 0
    (everything,) = rows(tmp_path / "all")
    assert everything["digest/completions"] == straight[0]["digest/completions"]
    assert everything["reward"] == straight[0]["reward"]  # of all completions
    assert everything["grad_norm"] != straight[0]["grad_norm"]


def test_a_step_whose_completions_are_all_truncated_has_a_gradient_of_0(tmp_path):
    settings = ["grpo.mask_truncated_completions=true", "grpo.max_completion_length=2", "run_dir=run"]
    done = launch(*OWN, *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for row in rows(tmp_path / "run"):
        assert row["completions/clipped_ratio"] == 1
        assert row["grad_norm"] == 0
        assert row["loss"] == 0
