"""Our graders beside those of other projects; needs the extra `judges`."""

import pytest

from tests.launches import ROOT

pytest.importorskip("lm_eval")
pytest.importorskip("math_verify")


@pytest.mark.slow
def test_the_table_of_the_docs():
    from tests.rewards.judges import table

    assert table() in (ROOT / "docs" / "grading.md").read_text("utf-8"), "python -m tests.rewards.judges"
