"""train.py without pictures and with one decoded validation pair, for tests that start it as a process of its own."""

import train
from continuation import distributed, plots, validation

plots.plot_curves = lambda path, records: None
validation.DECODED = 1
train.Run.write_sample = lambda run: None
distributed.leave(train.main(train.parse_args()))
