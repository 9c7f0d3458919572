"""The cost of steering: processor time of images with one feature added at every step, relative to the same images unedited.

Also measured, without a bar: an edit that reads the activation first (`set`), and so encodes it.
"""

import statistics
import sys
import time

import torch
from torch.nn import functional as F

import difflex
from difflex.dictionaries import SAE, DictionaryOrigin, Normalisation, SAEWeights
from difflex.records import Edit, Site
from difflex.steering import SteeringHook, dictionary_features, steering_hooks

torch.set_num_threads(1)
IMAGES, ROUNDS, SIZE, K = 32, 7, 2048, 32
SITE = Site("double.1")
BAR = 0.05
"""The largest extra time, as a share of that of unedited images."""


def dictionary(width: int) -> SAE:
    """Return a random dictionary: the cost of an edit does not depend on the meaning of its feature."""
    decoder = F.normalize(torch.randn(SIZE, width, generator=torch.Generator().manual_seed(0)), dim=1)
    weights = SAEWeights(
        encoder=decoder, decoder=decoder, bias=torch.zeros(width), encoder_bias=torch.zeros(SIZE), thresholds=None
    )
    origin = DictionaryOrigin(site=SITE, model="mini-flux")
    return SAE(kind="topk", k=K, origin=origin, normalisation=Normalisation.identity(width), weights=weights)


def main() -> int:
    """Run the benchmark; return 0 if the bar is met, else 1."""
    pipe = difflex.load("mini-flux")
    width = next(row.width for row in pipe.sites("double.1"))
    features = dictionary_features(dictionary(width), [7], None)
    edits = {
        operation: steering_hooks([Edit(operation=operation, site=SITE, strength=1.0, unit="code")], lambda _: features)
        for operation in ("add", "set")
    }
    runs: dict[str, list[SteeringHook]] = {"unedited": [], **edits}
    prompts = [f"a red star on {ground}" for ground in ("grass", "sand", "paper", "sky")] * (IMAGES // 4)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(ROUNDS + 1):
        for name, steering in runs.items():
            began = time.process_time()
            pipe.generate(prompts, batch=IMAGES, edits=steering)
            if number:  # the first round allocates memory
                times[name].append(time.process_time() - began)
    extra = {
        name: statistics.median(edited / plain for edited, plain in zip(times[name], times["unedited"], strict=True)) - 1
        for name in edits
    }
    print(f"  {IMAGES} images unedited: {statistics.median(times['unedited']):.2f} s; set, which encodes: {extra['set']:+.1%}")
    met = extra["add"] <= BAR
    print(f"steering: one feature added at every step costs {extra['add']:+.1%} (bar {BAR:.0%}): {'met' if met else 'MISSED'}")
    return not met


if __name__ == "__main__":
    sys.exit(main())
