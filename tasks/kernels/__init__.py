"""Compiled loops. Import a module of this folder late: each one loads numba."""
