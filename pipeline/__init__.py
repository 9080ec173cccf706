"""Handwriting data to a served, proven model: train, export, validate, package, serve, query."""
