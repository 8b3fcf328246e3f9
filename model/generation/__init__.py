"""Autoregressive generation with constant-size state: sampling, prefill, decoding, and text on top of them.

    config.py      GenerationConfig
    interface.py   what generation needs of a language model
    sampling.py    logits -> tokens
    prefill.py     prompts -> state, in chunks
    decoding.py    one token per step, in CUDA graphs where there are any
    speculative.py several tokens per step, which a draft model proposes
    generate.py    prompts -> tokens -> text

Nothing is imported here, so that commands can read `GenerationConfig` without importing torch.
"""
