"""Settings of screen_pairs: which pairs are not trained on."""

from conf.screen import ScreenConfig


class ScreenPairsConfig(ScreenConfig):
    """The settings of screen, for pairs: they say their prompt and both answers."""
