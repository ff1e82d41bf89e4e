"""The folder of the config, and the command of a launch, which works in any directory."""

from pathlib import Path

# In a checkout, conf/ is next to grpo/; in an installation, it is part of the package.
_PACKAGE = Path(__file__).resolve().parents[1]
CONF_DIR = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())
LAUNCH = ["grpo", "train"] if CONF_DIR.parent == _PACKAGE else ["python", str(CONF_DIR.parent / "launch.py")]
