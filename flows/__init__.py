"""Recipes as Prefect flows, the command line, the services and the report."""
