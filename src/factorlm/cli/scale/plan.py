"""``factorlm scale plan``: every run of a ladder, what it costs and how long it will take here."""

from __future__ import annotations

import argparse
import json

from factorlm.cli.scale._ladder import Display, add_ladder_arguments, read_ladder

HELP = "list a ladder's runs with their costs and hours, before anything starts"
EPILOG = """\
Hours come from a few training steps of every family and size, timed as the runs will run: as many
at a time, with as many threads. They are kept beside the runs; a changed recipe or another
processor has them timed again. --no-calibration counts only.

examples:
  factorlm scale plan recipes/ladders/books.yaml
  factorlm scale plan recipes/ladders/books.yaml --no-calibration --json
  factorlm scale plan ladder.yaml --executor ray --workers 8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    add_ladder_arguments(parser)
    parser.add_argument("--no-calibration", action="store_true", help="predict no hours")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, units in its keys")
    form.add_argument("--markdown", action="store_true", help="print Markdown")


def run(args: argparse.Namespace, extra: list[str]) -> int:
    """Print the plan."""
    from factorlm.report.ladder import plan_summary, plan_table
    from factorlm.scaling.ladder.calibration import calibrate
    from factorlm.scaling.ladder.executors import build_executor
    from factorlm.scaling.ladder.folder import LadderFolder
    from factorlm.scaling.ladder.plan import Plan
    from factorlm.scaling.ladder.prediction import predict

    file = read_ladder(args)
    plan, path = Plan(file), args.runs_dir / file.ladder.name
    folder = LadderFolder(path, args.records)
    runs, losses = plan.known(folder.losses)
    with build_executor(file.ladder.executor) as executor:
        speeds, workers = {}, executor.slots
        if not args.no_calibration:
            with Display() as display:
                speeds = calibrate(file, runs, path, executor, display.show)
    prediction = predict(plan, runs, losses, speeds, workers)
    if args.json:
        print(json.dumps(prediction.to_dict(), indent=2))
        return 0
    table = plan_table(prediction)
    print(table.markdown() if args.markdown else table.plain())
    print(f"\n{plan_summary(prediction)}")
    return 0
