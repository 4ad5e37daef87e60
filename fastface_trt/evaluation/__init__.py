"""Quality, measured: the paper's protocol as data, judges, experiments, a resumable run and tables.

In the order of a run: `experiment` (what to vary) and `settings` (the requests that come of it),
`data` and `mini_data` (people and prompts), `judges` (the interface) with `mini_judges`,
`face_judges`, `clip_judges` and `reward_judge`, `exports` (an export per LoRA scale), `runner`,
`results` (the files of a run), `statistics` and `tables`.
"""
