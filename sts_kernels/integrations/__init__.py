"""Glue between the ops and other libraries. Each subpackage imports its library; this package imports none."""
