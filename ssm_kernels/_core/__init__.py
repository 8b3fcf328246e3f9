"""Dispatch, validation, op registration and packed sequences, shared by the ops."""
