"""What a source that does harm costs: one of three sources calls every class the next one, or has 30 % wrong labels.

    python benchmarks/harmful_source.py mnist_shifts --seeds 0 1 2 --workers 2
    python benchmarks/harmful_source.py pacs_adaptation --seeds 0

Each of an experiment's targets in turn; all other domains are sources, and one of them is spoiled, another one in each seed. Runs
``python -m sim experiment=...`` four times for each: without that source, with it as it is, and with it spoiled in either way. What it
costs counts from the run without it: nobody who knew of it could do better. Every finished run is a line of
``results/harmful_source_<experiment>.jsonl``, and a command that was stopped goes on with the runs that are missing. ``--validation``
holds a tenth of the training images out and leaves the test set unread.
"""

from __future__ import annotations

import argparse
from statistics import mean

import adaptation
from common import played, resumable, write

from sim.config import composed
from sim.federation import dataset_of

WAYS = ("adaptation=[self_training,coral,label_spreading,kd3a]", "synthesis=[di]")
WITHOUT, AS_IT_IS = "without it", "as it is"
SPOILED = {
    "another order": "{_target_:fedimpr.data.faults.PermutedLabels}",
    "30 % wrong": "{_target_:fedimpr.data.faults.WrongLabels,share:0.3}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=("mnist_shifts", "pacs_adaptation"))
    parser.add_argument("--tiny", action="store_true", help="a few steps of everything, written nowhere but to the screen")
    resumable(parser)
    asked = parser.parse_args()
    targets, cases = adaptation.TARGETS[asked.experiment], (WITHOUT, AS_IT_IS, *SPOILED)
    if asked.tiny:
        short = adaptation.tiny(asked.experiment, asked, *WAYS)
        print(table([run(asked.experiment, targets[0], 1, case, short) for case in cases]))
        return
    jobs = [(target, seed, case) for seed in asked.seeds for target in targets for case in cases]
    name, command, runs = played("harmful_source", asked.experiment, asked, jobs, ("target", "seed", "case"), run)
    write(name, command, {"runs": runs}, table(runs))


def run(experiment: str, target: str, seed: int, case: str, more: list[str]) -> dict:
    """One seed, target and case: accuracy by row, and what the sources were worth."""
    domains = dataset_of(composed([f"experiment={experiment}"])).train.domain_names
    sources = [domain for domain in domains if domain != target]
    harmful = sources[seed % len(sources)]
    if case == WITHOUT:
        sources.remove(harmful)
    words = [*WAYS, f"strategy.sources=[{','.join(sources)}]"]
    if case in SPOILED:
        words.append(f"+faults.{domains.index(harmful)}={SPOILED[case]}")
    told = adaptation.run(experiment, target, seed, [*words, *more])
    weight = told["sources"].get(domains.index(harmful), {}).get("usefulness")
    return {**told, "case": case, "harmful": harmful, "weight": weight}


def table(runs: list[dict]) -> str:
    """One line a row: its mean accuracy in each case, what each kind of harm costs on average, and at most."""
    cases = list(dict.fromkeys(run["case"] for run in runs))
    found = {case: {(run["target"], run["seed"]): run for run in runs if run["case"] == case} for case in cases}
    costing = [case for case in cases if case != WITHOUT]
    columns = ["row", *(f"{case}, %" for case in cases), *(f"cost of it {case}, points (most)" for case in costing)]
    text = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in runs[0]["rows"]:
        accuracy = {case: {key: 100 * run["rows"][name]["accuracy"] for key, run in of.items()} for case, of in found.items()}
        cells = [name, *(f"{mean(accuracy[case].values()):.1f}" for case in cases)]
        for case in costing:
            costs = [accuracy[WITHOUT][key] - value for key, value in accuracy[case].items() if key in accuracy[WITHOUT]]
            cells.append(f"{mean(costs):+.1f} ({max(costs):+.1f})")
        text.append(f"| {' | '.join(cells)} |")
    text += [
        "",
        f"| target, seed | the source | {' | '.join(f'its weight {case}' for case in costing)} |",
        "|---" * (len(costing) + 2) + "|",
    ]
    for target, seed in found[cases[0]]:
        line = [found[case].get((target, seed)) for case in costing]
        weights = ["" if run is None else f"{run['weight']:.2f}" for run in line]
        text.append(f"| {target}, {seed} | {found[cases[0]][target, seed]['harmful']} | {' | '.join(weights)} |")
    return "\n".join(text)


if __name__ == "__main__":
    main()
