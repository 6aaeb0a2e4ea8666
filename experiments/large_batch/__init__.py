"""Optimizers by batch size, each tuned alike: what `large_batch_study` runs.

`problems` holds the tasks, `contestants` the optimizers, `runs` one run, `cells` the
search and the seeds of one optimizer at one batch size, `noise_scale` the batch size at
which noise and gradient are alike, `curves` training loss beside test error, and
`findings` the record's rows, tables and picture.
"""
