"""Write the report of a sweep or of a run, as one HTML file that needs no network.

python -m grpo report sweep_dir=outputs/sweeps/...       into its report.html and sweep.csv
python -m grpo report run_dir=outputs/...                into its report.html, plots/ and summary.json
python -m grpo report ... output_dir=DIR                 into another folder
"""

from pathlib import Path

from hydra.errors import HydraException

from grpo.commands._common import existing_run, own_arguments
from grpo.config.errors import ConfigError, first_line
from grpo.runs.files import check_contents


def main(arguments: list[str]) -> None:
    """Write the report and print where it is."""
    own, overrides = own_arguments(arguments, ["run_dir", "sweep_dir", "output_dir"])
    output_dir = Path(own.pop("output_dir")) if "output_dir" in own else None
    if overrides or len(own) != 1:
        raise ConfigError("report takes one of sweep_dir=outputs/sweeps/... and run_dir=outputs/...")
    try:
        print("\n".join(_report(own, output_dir)))
    except HydraException as error:
        raise ConfigError(
            f"{own['sweep_dir']}/sweep.json has an override that is not valid: {first_line(error)}"
        ) from error
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from error
    except OSError as error:  # for example in the folder of another user
        raise ConfigError(f"the report could not be written ({error}); give another folder: output_dir=DIR") from error


def _report(own: dict[str, str], output_dir: Path | None) -> list[str]:
    if "sweep_dir" in own:
        from grpo.analysis.sweep_report import write_sweep_report

        check_contents(Path(own["sweep_dir"]))
        files, headline = write_sweep_report(own["sweep_dir"].rstrip("/"), output_dir)
        return [headline, *map(str, files)]
    from grpo.analysis.run_report import write_run_report

    return [str(write_run_report(existing_run(own["run_dir"]).path, output_dir))]
