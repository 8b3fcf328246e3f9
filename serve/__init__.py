"""Serving of a model to many clients at once: continuous batching, a cache of states, and OpenAI's HTTP interface.

    config.py       limits as plain values
    prompts.py      conversations and texts -> tokens with preprocessed images
    state_cache.py  prefix of a prompt -> state after it
    waiting.py      requests that wait, users in turn
    engine.py       requests -> tokens -> text, in one running batch

Nothing is imported here, so that commands can read `ServeConfig` without importing torch.
"""
