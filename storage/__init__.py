"""What exists: the artifact store and one file per kind of artifact."""
