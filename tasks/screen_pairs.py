"""The stage that takes unfit, leaked and repeated pairs out, and gives domains their shares."""

from conf.screen_pairs import ScreenPairsConfig
from storage.jsonl import Split
from storage.preferences import Preference, Preferences
from tasks.screening import HELD_FIRST, Told, screened
from tasks.stage import Job, stage


@stage(version=1)
def screen_pairs(job: Job, preferences: Preferences, settings: ScreenPairsConfig) -> Preferences:
    """Do with pairs what screen does with conversations; a pair says its prompt and both answers.

    reads Preferences, exam files   writes Preferences and `dropped.parquet`   cost as screen
    """
    rows = [_told(split, row) for split in HELD_FIRST for row in preferences.rows(split)]
    job.metrics["pairs"] = screened(job, rows, settings)
    return Preferences(job.path)


def _told(split: Split, row: Preference) -> Told:
    answers = [answer for answer in (row["chosen"], row["rejected"]) if answer is not None]
    said = [message["content"] for message in row["prompt"]]
    return Told(split, row, answers, "\n".join([*said, *answers]))
