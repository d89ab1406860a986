"""The states of the world that stop a run, drawn as one tree.

    BessemerError
    ├── DamagedArtifact    bytes in the store are not those that were committed (now in quarantine)
    ├── BucketAway         no S3 server answers, or it was not told who asks (storage/bucket.py)
    ├── NoRoom             the store's disk has no room for what a stage will write (flows/room.py)
    ├── PartsFailed        shards of a fan-out could not be built; the others are in the store
    ├── JobFailed          a torch job ended badly (tasks/launch.py)
    ├── EndpointFailed     a language model's endpoint refuses or does not answer (tasks/completions.py)
    ├── JudgeFailed        a judge does, while a policy learns from it (model/judge.py)
    └── ServiceError       a server that a run needs does not answer (flows/runs.py)

A wrong choice of the caller is a ValueError.
"""


class BessemerError(Exception):
    """Root of the named errors; its text says what was found, what was expected, what to do next."""


class DamagedArtifact(BessemerError):
    """An artifact's bytes differ from its record. It lies in quarantine; running again rebuilds it."""


class BucketAway(BessemerError, ConnectionError):
    """A bucket cannot be reached; an OSError, as a folder that is away is."""


class NoRoom(BessemerError):
    """The disk of the store is too full for a stage that was about to begin."""


class PartsFailed(BessemerError):
    """Some parts of a fan-out failed; those that did not are committed and will be reused."""
