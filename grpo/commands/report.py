"""The report of a sweep, as one HTML file that opens anywhere.

python -m grpo report sweep_dir=outputs/sweeps/...       into its report.html and sweep.csv
"""

from grpo.commands._common import own_arguments
from grpo.config import ConfigError


def main(arguments: list[str]) -> None:
    """Write the report and print where it is."""
    own, overrides = own_arguments(arguments, ["sweep_dir"])
    if overrides or len(own) != 1:
        raise ConfigError("report takes one of sweep_dir=outputs/sweeps/... and run_dir=outputs/...")
    from grpo.analysis.sweep_report import write_sweep_report

    try:
        files, headline = write_sweep_report(own["sweep_dir"].rstrip("/"))
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from error
    print("\n".join([headline, *map(str, files)]))
