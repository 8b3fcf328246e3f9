"""The papers' tables by one command: their rows, the full-size runs, and the same rows in miniature on easy-VQA."""
