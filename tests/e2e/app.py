"""The command line with the tiny stages of the flow tests: `python -m tests.e2e.app run tiny.yaml`."""

from flows.cli import main
from tasks import stage as registry
from tests.flows.tiny_stages import tiny_stages

if __name__ == "__main__":
    # A parallel part starts as this module again, in which nothing must run.
    registry.stages = tiny_stages  # type: ignore[assignment]
    main()
