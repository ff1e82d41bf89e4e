"""Write the charts and the summary of a run from its metrics.

python -m grpo plot run_dir=outputs/...                  into its plots/ and summary.json
python -m grpo plot run_dir=outputs/... output_dir=DIR   into another folder
"""

from pathlib import Path

from grpo.commands._common import own_arguments, run_folder_of
from grpo.config.errors import ConfigError


def main(arguments: list[str]) -> None:
    """Draw the charts and print where they are."""
    own, overrides = own_arguments(arguments, ["run_dir", "output_dir"])
    if overrides:
        raise ConfigError(f"plot takes run_dir= and output_dir=, not {overrides[0]}")
    folder = run_folder_of(arguments)
    if folder is None:
        raise ConfigError("plot needs a run folder: python -m grpo plot run_dir=outputs/...")
    from grpo.analysis.charts import write_charts

    try:
        files = write_charts(folder.path, Path(own["output_dir"]) if "output_dir" in own else None)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:  # for example in the folder of another user
        raise ConfigError(f"the charts could not be written ({error}); give another folder: output_dir=DIR") from error
    print("\n".join(str(file) for file in files))
