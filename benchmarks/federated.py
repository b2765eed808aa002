"""What a federation is worth: pipelines/federated_mnist.yaml against each party alone, and all private data together.

Each net takes equally many steps in all three: alone on its party's own samples, centralised on the private samples of
all parties. The partition is the same for every seed; initial weights and the order of samples are not. With --tune the
settings that were tried are compared on the validation split, at a seed of their own; the test split is not looked at.
Runs that are finished are not repeated. With --write the table goes to pipelines/README.md and to benchmarks/results/.

    python benchmarks/federated.py --tune
    python benchmarks/federated.py --write
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import conditions, fresh_folder, options, parse, table, write_result

from logitcache.catalog.parts import PartConfig
from logitcache.config.build import resolve_data
from logitcache.config.schema import Pipeline
from logitcache.extras.federation.configuration import Federation, PartyConfig, load_federation
from logitcache.extras.federation.rounds import PartyRound, federate
from logitcache.progress import silence
from logitcache.stages.train_teacher import train_teacher

PIPELINES = Path(__file__).parent.parent / "pipelines"
FILE = PIPELINES / "federated_mnist.yaml"
BEGIN, END = "<!-- made by benchmarks/federated.py -->", "<!-- end of the federation -->"
TUNING_SEED = 100
TRIES: tuple[list[str], ...] = (
    [],
    ["consensus.combine=logits"],
    ["consensus.loss.temperature=3"],
)
"""Overrides of the file; each against the file as it was when they were tried."""
TINY = [
    "rounds=1",
    "train.epochs=1",
    "consensus.train.epochs=1",
    *(f"{part}.data.name=digits" for part in ("public", *(f"parties.{number}" for number in range(4)))),
]


def main() -> None:
    parser = options(__doc__, writes="pipelines/README.md and benchmarks/results/")
    parser.add_argument("--folder", type=Path, default=Path("federations/mnist"), help="where runs and caches go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="two at least")
    parser.add_argument("--tune", action="store_true", help="compare settings on the validation split")
    arguments = parse(parser, seeds=[0, 1])
    silence()
    folder, overrides = (fresh_folder(), TINY) if arguments.tiny else (arguments.folder, [])
    if arguments.tune:
        print(table(["overrides", "validation accuracy, mean", "of each party"], []))
        for number, tried in enumerate(TRIES):
            turns = federate(federation_of(TUNING_SEED, folder / f"try-{number}", [*overrides, *tried]))
            last = [turn.validation_accuracy or 0.0 for turn in turns[-4:]]
            each = ", ".join(f"{accuracy:.1%}" for accuracy in last)
            print(f"| {' '.join(tried)} | {statistics.fmean(last):.2%} | {each} |", flush=True)
        return
    about = conditions()
    body = section(folder, arguments.seeds, overrides)
    print(body)
    if arguments.write:
        path = write_result("federated", f"# Federated distillation\n\n{about}\n\n{body}\n", device=torch.device("cpu"))
        readme = PIPELINES / "README.md"
        made = f"{BEGIN}\n\n{body}\n\nResult: [{path.name}](../benchmarks/results/{path.name}).\n\n{END}"
        readme.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: made, readme.read_text(), flags=re.DOTALL))


def federation_of(seed: int, folder: Path, overrides: Sequence[str] = ()) -> Federation:
    """The example, with a seed and a place of its own."""
    return load_federation(FILE, [f"seed={seed}", f"path={folder}", f"shared={folder}/shared", *overrides])


def section(folder: Path, seeds: Sequence[int], overrides: Sequence[str]) -> str:
    """The table, and what it says."""
    found: dict[str, dict[str, list[float]]] = {}
    sizes: dict[str, tuple[str, int, int]] = {}
    for seed in seeds:
        federation = federation_of(seed, folder / f"seed-{seed}", overrides)
        turns = federate(federation)
        for party, turn in zip(federation.parties, turns[-len(federation.parties) :], strict=True):
            assert party.net is not None
            sizes[party.name] = (described(party), turn.parameters, turn.private_samples)
            accuracies = {
                "alone": alone(federation, party, folder / f"seed-{seed}/{party.name}/alone"),
                "federated": turn.accuracy,
                "centralised": alone(federation, party, folder / f"seed-{seed}/{party.name}/centralised", pooled=True),
            }
            for name, accuracy in accuracies.items():
                found.setdefault(party.name, {}).setdefault(name, []).append(accuracy or 0.0)
    ways = ("alone", "federated", "centralised")
    cells = [[party, *sizes[party], *(spread(found[party][way]) for way in ways)] for party in found]
    header = ["party", "net", "parameters", "own samples", *(f"{way}, %" for way in ways)]
    lines = [difference(party, values["federated"], values["alone"]) for party, values in found.items()]
    return f"{table(header, cells)}\n\n{' '.join(lines)}"


def alone(federation: Federation, party: PartyConfig, folder: Path, *, pooled: bool = False) -> float | None:
    """The party's net after as many steps, on its own samples only, or on those of all parties."""
    pipeline = Pipeline(**PartyRound(federation, party, 1).private_settings)
    data = pipeline.data
    assert data.part is not None
    if pooled:
        data = data.model_copy(update={"part": PartConfig(public=data.part.public, index=0, seed=data.part.seed)})
    pipeline = pipeline.model_copy(
        update={"data": data, "runs": pipeline.runs.model_copy(update={"path": str(folder)})}
    )
    steps = federation.rounds * (
        steps_of(Pipeline(**PartyRound(federation, party, 1).private_settings))
        + steps_of(Pipeline(**PartyRound(federation, party, 1).public_settings))
    )
    epochs = round(steps / steps_of(pipeline, epochs=1))
    pipeline = pipeline.model_copy(update={"train": pipeline.train.model_copy(update={"epochs": epochs})})
    result: dict[str, Any] = train_teacher(pipeline)
    return result["accuracy"]


def steps_of(pipeline: Pipeline, *, epochs: int | None = None) -> int:
    """Steps of a training of the pipeline."""
    samples = len(resolve_data(pipeline, trust=False).train)
    return (epochs or pipeline.train.epochs) * math.ceil(samples / pipeline.train.batch_size)


def described(party: PartyConfig) -> str:
    assert party.net is not None
    return f"{party.net.model} {', '.join(f'{name} {value}' for name, value in party.net.args.items())}"


def spread(accuracies: list[float]) -> str:
    return f"{100 * statistics.fmean(accuracies):.2f} ± {100 * statistics.stdev(accuracies):.2f}"


def difference(party: str, federated: list[float], by_itself: list[float]) -> str:
    """What the federation gave a party, and whether the seeds show it."""
    points = 100 * (statistics.fmean(federated) - statistics.fmean(by_itself))
    error = 100 * math.sqrt(sum(statistics.variance(each) / len(each) for each in (federated, by_itself)))
    verdict = "more than two standard errors" if abs(points) > 2 * error else "no significant difference"
    return f"{party}: {points:+.2f} points against alone, {verdict} (standard error {error:.2f})."


if __name__ == "__main__":
    main()
