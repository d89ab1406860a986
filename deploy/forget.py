"""Marks MLflow's runs as deleted that ended so many days ago: python deploy/forget.py DAYS.

MLFLOW_TRACKING_URI says where they are. The page shows them no longer, and can still bring them back; what they
take on the disk is free after `mlflow gc`.
"""

import sys
import time

from mlflow.tracking import MlflowClient

EXPERIMENT = "bessemer"
DAY_SECONDS = 86_400


def main(days: float) -> None:
    """Delete every run of Bessemer's that ended before that; what went is told."""
    client = MlflowClient()
    before = int((time.time() - days * DAY_SECONDS) * 1000)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    wanted = f"attributes.end_time > 0 and attributes.end_time < {before}"
    count = 0
    # Deleted runs are found no longer: the next page is the first.
    while experiment and (found := client.search_runs([experiment.experiment_id], wanted)):
        for run in found:
            client.delete_run(run.info.run_id)
        count += len(found)
    sys.stdout.write(f"{count} runs deleted\n")


if __name__ == "__main__":
    main(float(sys.argv[1]))
