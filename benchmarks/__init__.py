"""Speed against named peers, on the same work in the same run. `make bench`, or `make bench DATA=DIR`."""
