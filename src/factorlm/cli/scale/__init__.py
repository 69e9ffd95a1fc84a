"""``factorlm scale <command>``: scaling laws. A file a command, as in ``factorlm.cli``."""

HELP = "train ladders of models, fit scaling laws with intervals, and test what is claimed of them"
