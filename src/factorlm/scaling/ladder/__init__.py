"""Ladders: families of models over sizes and seeds, planned, predicted and run from one YAML file.

``config`` is the file, ``plan`` its runs, ``calibration`` what they will take here, ``queue`` what
runs them and ``executors`` where. Facts travel as the runs' own records.
"""

from factorlm.scaling.ladder.config import Ladder, load_ladder

__all__ = ["Ladder", "load_ladder"]
