#!/usr/bin/env python
r"""Models the time of a step of stage lora on many GPUs, from a plan and the bytes that the GPUs exchange.

    python tools/train_net.py --config-file configs/visft_eva.yaml --num-gpus 8 --plan --output plan.json
    scripts/scaling.py plan.json --flops 4e14 [--gpus 8 64] [--bandwidths 1.25 12.5 50 400]
    scripts/scaling.py plan.json --seconds 0.5 ...

This is a model, not a measurement. It needs neither torch nor a GPU. Each GPU has the images that it has in the plan,
so the batch grows with the number of GPUs. A step computes for (operations of the plan) / FLOPS, or for the measured
SECONDS. The exchange takes (bytes through the narrowest link of the ring) / BANDWIDTH, in GB/s; latency is left out.
With N GPUs, G bytes of gradients and W bytes of the tower's weights, these bytes are

    DDP     2 (N - 1) / N * G             a ring all-reduce, after the backward pass, so that its time is added
    FSDP2   (N - 1) / N * (2 W + G)       W is gathered in the forward and in the backward pass, G is reduced; the next
                                          block is gathered while one computes, so the longer of both times counts

Trained weights outside the tower (heads with FREEZE_HEADS False) are all-reduced under both. All weights of the tower
count as gathered, also the few outside its blocks. Left out are the one block that is gathered ahead for nothing, and
the further passes of the tower that some objectives need, each of which gathers W once more.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

NOTICED = 0.05
"""The share of a step from which an exchange that is not hidden begins to matter."""

_FLOAT32, _FLOAT16 = 4, 2


@dataclass(frozen=True)
class Exchange:
    """Bytes that a GPU sends in a step.

    Attributes:
        hidden: at best, while it computes. added: after it has computed.
    """

    hidden: float
    added: float

    def seconds(self, compute: float, bandwidth: float) -> float:
        """Time of a step."""
        return max(compute, self.hidden / bandwidth) + self.added / bandwidth

    def matters_below(self, compute: float) -> float:
        """The bandwidth below which a step takes longer than 1 + NOTICED times its computation.

        Increasing the bandwidth shortens both parts, so the smallest one that is enough is that of the tighter bound.
        """
        limit = (1 + NOTICED) * compute
        return max((self.hidden + self.added) / limit, self.added / (NOTICED * compute))


def exchanges(plan: dict, gpus: int) -> dict[str, Exchange]:
    """Return the bytes of a step of stage lora for each strategy."""
    inside, outside = 0, 0
    for part, numbers in plan["parameters"].items():
        trained = _FLOAT32 * numbers.get("lora", 0)
        if part in ("tower", "LoRA"):
            inside += trained
        else:
            outside += trained
    weights = _FLOAT32 * plan["parameters"].get("LoRA", {"all": 0})["all"]
    weights += _stored(plan) * plan["parameters"]["tower"]["all"]
    part = (gpus - 1) / gpus
    return {
        "DDP": Exchange(0.0, 2 * part * (inside + outside)),
        "FSDP2": Exchange(part * (2 * weights + inside), 2 * part * outside),
    }


def _stored(plan: dict) -> int:
    """Return the bytes of a stored weight of the tower: MODEL.CLIP_VIT.FROZEN_DTYPE."""
    types = {name for step in plan["steps"] if step["stage"] == "lora" for name in step["frozen"]}
    return _FLOAT16 if types & {"float16", "bfloat16"} else _FLOAT32


def rows(
    plan: dict, gpus: list[int], bandwidths: list[float], flops: float = 0.0, seconds: float = 0.0
) -> list[dict]:
    """Return a row for each task of stage lora, number of GPUs and strategy.

    Args:
        bandwidths: in bytes per second.
        flops: operations per second of a GPU. seconds: of a step's computation, instead of `flops`.
    """
    found = []
    for step in plan["steps"]:
        if step["stage"] != "lora":
            continue
        compute = seconds or step["step_flop"] / flops
        for count in gpus:
            for strategy, exchange in exchanges(plan, count).items():
                found.append(
                    {
                        "task": step["task"] or "",
                        "images": step["images"],
                        "size": step["size"],
                        "compute": compute,
                        "gpus": count,
                        "strategy": strategy,
                        "bytes": exchange.hidden + exchange.added,
                        "matters_below": exchange.matters_below(compute),
                        "times": [exchange.seconds(compute, b) / compute for b in bandwidths],
                    }
                )
    return found


def table(found: list[dict], bandwidths: list[float]) -> str:
    """Return rows as Markdown."""
    head = ["task", "images per GPU", "computes, s", "GPUs", "strategy", "sends, GB", "matters below, GB/s"]
    head += [f"{b / 1e9:g} GB/s" for b in bandwidths]
    lines = [head, ["---"] * 3 + ["---:"] * (len(head) - 3)]
    for row in found:
        size = " x ".join(map(str, row["size"]))
        lines.append(
            [
                row["task"],
                f"{row['images']} x {size}",
                f"{row['compute']:.3g}",
                str(row["gpus"]),
                row["strategy"],
                f"{row['bytes'] / 1e9:.3g}",
                f"{row['matters_below'] / 1e9:.3g}",
                *(f"{time:.2f}" for time in row["times"]),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, help="JSON file of tools/train_net.py --plan --output")
    compute = parser.add_mutually_exclusive_group(required=True)
    compute.add_argument("--flops", type=float, default=0.0, help="operations per second that a GPU reaches")
    compute.add_argument("--seconds", type=float, default=0.0, help="measured time of a step on one GPU")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--bandwidths", type=float, nargs="+", default=[1.25, 12.5, 50, 400], metavar="GB/s")
    args = parser.parse_args()
    if min(args.flops or args.seconds, *args.gpus, *args.bandwidths) <= 0:
        parser.error("expected numbers above 0")
    plan = json.loads(args.plan.read_text())
    bandwidths = [1e9 * b for b in args.bandwidths]
    found = rows(plan, args.gpus, bandwidths, args.flops, args.seconds)
    if not found:
        sys.exit(f"{args.plan}: the plan has no stage lora; plan a config whose VISFT.STAGES has it")
    print(f"{plan['tower']}, stage lora: a model, not a measurement\n\n{table(found, bandwidths)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
