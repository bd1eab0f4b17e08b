"""Methods x bits x seeds, compared: what `mecdeploy compare` does (docs/compare.md).

config      study.toml, read and validated
plan        its cells: one run each, with a TrainConfig
running     the runs as processes of their own, several at once, resumed
child       what such a process executes
results     results.jsonl from the runs' own files; test.jsonl, once
statistics  means, and differences to the baseline seed by seed
report      all of it, as data
tables      ... for a terminal and as markdown
plots       ... as SVG
compare     the function of the API
"""
