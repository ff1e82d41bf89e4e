"""Write the report of a sweep or of a run, as one HTML file that needs no network.

python -m grpo report sweep_dir=outputs/sweeps/...       into its report.html and sweep.csv
python -m grpo report run_dir=outputs/...                into its report.html
"""

from pathlib import Path

from hydra.errors import HydraException

from grpo.commands._common import existing_run, own_arguments
from grpo.config.errors import ConfigError, first_line
from grpo.runs.files import check_contents


def main(arguments: list[str]) -> None:
    """Write the report and print where it is."""
    own, overrides = own_arguments(arguments, ["run_dir", "sweep_dir"])
    if overrides or len(own) != 1:
        raise ConfigError("report takes one of sweep_dir=outputs/sweeps/... and run_dir=outputs/...")
    try:
        print("\n".join(_report(own)))
    except HydraException as error:
        raise ConfigError(
            f"{own['sweep_dir']}/sweep.json has an override that is not valid: {first_line(error)}"
        ) from error
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from error


def _report(own: dict[str, str]) -> list[str]:
    if "sweep_dir" in own:
        from grpo.analysis.sweep_report import write_sweep_report

        check_contents(Path(own["sweep_dir"]))
        files, headline = write_sweep_report(own["sweep_dir"].rstrip("/"))
        return [headline, *map(str, files)]
    from grpo.analysis.run_report import write_run_report

    return [str(write_run_report(existing_run(own["run_dir"]).path))]
