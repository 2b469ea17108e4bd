"""Run by the interpreter of a virtual environment that has the package `sweeps`: check a sweep file, propose its runs.

Prints a JSON list of what each run sets; a search gets made-up scores, so that it goes on from them.
"""

import json
import sys

import yaml
from sweeps import RunState, SweepRun, next_runs, schema_violations_from_proposed_config

with open(sys.argv[1]) as file:
    sweep = yaml.safe_load(file)
violations = schema_violations_from_proposed_config(sweep)
if violations:
    sys.exit("\n".join(map(str, violations)))
runs = []
while len(runs) < 100:
    (proposed,) = next_runs(sweep, runs, validate=True, n=1)
    if proposed is None or (sweep["method"] != "grid" and len(runs) == 6):
        break
    score = {sweep["metric"]["name"]: 0.1 * len(runs)}
    runs.append(SweepRun(name=str(len(runs)), config=proposed.config, state=RunState.finished, summary_metrics=score))
print(json.dumps([{name: entry["value"] for name, entry in run.config.items()} for run in runs]))
