"""`ssm-bench prefill` and `decode`: vision-language models against context.

Files, in the order of a run: `specs` (shapes of the models), `models` (building, prefilling and stepping them),
`measure` (one model at a batch and a context), `command` (all of them in turn), `report` (tables, plots, the page).
"""
